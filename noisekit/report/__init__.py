"""From analyses of many runs to one page that stands alone."""

from noisekit.report.comparability import (
    budget_snapshots,
    fades_with_loss,
    fair_test_rules,
    is_rescaling_invariant,
    loss_ratio,
    paired_sample,
    paired_samples,
    stated_contrasts,
    values_by_seed,
)
from noisekit.report.page import build_report
from noisekit.report.provenance import provenance_of
from noisekit.report.results import AnalysisResult, Provenance, Rule, Table

__all__ = [
    "AnalysisResult",
    "Provenance",
    "Rule",
    "Table",
    "budget_snapshots",
    "build_report",
    "fades_with_loss",
    "fair_test_rules",
    "is_rescaling_invariant",
    "loss_ratio",
    "paired_sample",
    "paired_samples",
    "provenance_of",
    "stated_contrasts",
    "values_by_seed",
]
