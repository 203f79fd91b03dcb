"""Effects with intervals, and verdicts by rules fixed before the runs."""

from noisekit.stats.bootstrap import BootstrapResult, hierarchical_bootstrap
from noisekit.stats.contrasts import (
    Contrast,
    ContrastResult,
    PairedSample,
    Verdict,
    arms_named,
    contrast_titles,
)
from noisekit.stats.crossed import crossed_difference
from noisekit.stats.curves import common_grid, on_grid
from noisekit.stats.effects import PairedEffect, paired_effect
from noisekit.stats.judgement import judge, require_verdict
from noisekit.stats.permutation import PermutationBand, permutation_band
from noisekit.stats.rank import RankCorrelation, kendall_tau

__all__ = [
    "BootstrapResult",
    "Contrast",
    "ContrastResult",
    "PairedEffect",
    "PairedSample",
    "PermutationBand",
    "RankCorrelation",
    "Verdict",
    "arms_named",
    "common_grid",
    "contrast_titles",
    "crossed_difference",
    "hierarchical_bootstrap",
    "judge",
    "kendall_tau",
    "on_grid",
    "paired_effect",
    "permutation_band",
    "require_verdict",
]
