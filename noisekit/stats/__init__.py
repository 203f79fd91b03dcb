"""Effects with intervals, and verdicts by rules fixed before looking."""

from noisekit.stats.bootstrap import (
    BootstrapResult,
    hierarchical_bootstrap,
    paired_bootstrap,
)
from noisekit.stats.contrasts import (
    Contrast,
    ContrastResult,
    PairedSample,
    Verdict,
)
from noisekit.stats.crossed import crossed_difference
from noisekit.stats.curves import CurveBand, common_grid, curve_band, on_grid
from noisekit.stats.hypothesis import (
    MarginTest,
    PairedEffect,
    equivalence_test,
    paired_effect,
)
from noisekit.stats.judgement import judge, require_verdict
from noisekit.stats.multiplicity import holm, pooled_adjustment
from noisekit.stats.permutation import PermutationBand, permutation_band
from noisekit.stats.rank import RankCorrelation, kendall_tau

__all__ = [
    "BootstrapResult",
    "Contrast",
    "ContrastResult",
    "CurveBand",
    "MarginTest",
    "PairedEffect",
    "PairedSample",
    "PermutationBand",
    "RankCorrelation",
    "Verdict",
    "common_grid",
    "crossed_difference",
    "curve_band",
    "equivalence_test",
    "hierarchical_bootstrap",
    "holm",
    "judge",
    "kendall_tau",
    "on_grid",
    "paired_bootstrap",
    "paired_effect",
    "permutation_band",
    "pooled_adjustment",
    "require_verdict",
]
