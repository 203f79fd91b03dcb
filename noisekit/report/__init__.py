"""From analyses of many runs to one self-contained page."""

from noisekit.report.arm_tables import (
    accuracy_table,
    matched_snapshots,
    mean_and_spread,
    measured_table,
    ratio_table,
    rows_by_arm,
    stability_limits,
    weights_table,
)
from noisekit.report.check_tables import agreement_table, image_error_table
from noisekit.report.comparability import (
    budget_snapshots,
    correct_answers,
    fades_with_loss,
    is_rescaling_invariant,
    loss_ratio,
    paired_sample,
    paired_samples,
    values_by_seed,
)
from noisekit.report.contrast_words import answer, sentence
from noisekit.report.page import build_report
from noisekit.report.provenance import provenance_of
from noisekit.report.recipe_view import (
    arm_settings,
    claims,
    numbers_by_arm,
    question,
    setting_words,
    stated_contrasts,
)
from noisekit.report.results import AnalysisResult, Provenance, Rule, Table
from noisekit.report.rules import fair_test_rules

__all__ = [
    "AnalysisResult",
    "Provenance",
    "Rule",
    "Table",
    "accuracy_table",
    "agreement_table",
    "answer",
    "arm_settings",
    "budget_snapshots",
    "build_report",
    "claims",
    "correct_answers",
    "fades_with_loss",
    "fair_test_rules",
    "image_error_table",
    "is_rescaling_invariant",
    "loss_ratio",
    "matched_snapshots",
    "mean_and_spread",
    "measured_table",
    "numbers_by_arm",
    "paired_sample",
    "paired_samples",
    "provenance_of",
    "question",
    "ratio_table",
    "rows_by_arm",
    "sentence",
    "setting_words",
    "stability_limits",
    "stated_contrasts",
    "values_by_seed",
    "weights_table",
]
