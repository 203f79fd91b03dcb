"""From analyses of many runs to one self-contained page."""

from noisekit.report.arm_tables import (
    accuracy_table,
    accuracy_words,
    end_snapshot,
    epsilon_table,
    extreme_arms,
    matched_snapshots,
    mean_and_spread,
    measured_table,
    ratio_table,
    rows_by_arm,
    same_network,
    stability_limits,
    weights_table,
)
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
from noisekit.report.instrument_checks import (
    agreement_table,
    check_tables,
    curve_gap_table,
    expected_sq_norm,
    image_error_table,
    norm_deviations,
    rank_table,
)
from noisekit.report.own_loop import own_loop_result
from noisekit.report.page_model import build_report
from noisekit.report.provenance import provenance_of
from noisekit.report.recipe_view import (
    arm_settings,
    claims,
    numbers_by_arm,
    question,
    run_settings,
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
    "accuracy_words",
    "agreement_table",
    "answer",
    "arm_settings",
    "budget_snapshots",
    "build_report",
    "check_tables",
    "claims",
    "correct_answers",
    "curve_gap_table",
    "end_snapshot",
    "epsilon_table",
    "expected_sq_norm",
    "extreme_arms",
    "fades_with_loss",
    "fair_test_rules",
    "image_error_table",
    "is_rescaling_invariant",
    "loss_ratio",
    "matched_snapshots",
    "mean_and_spread",
    "measured_table",
    "norm_deviations",
    "numbers_by_arm",
    "own_loop_result",
    "paired_sample",
    "paired_samples",
    "provenance_of",
    "question",
    "rank_table",
    "ratio_table",
    "rows_by_arm",
    "run_settings",
    "same_network",
    "sentence",
    "setting_words",
    "stability_limits",
    "stated_contrasts",
    "values_by_seed",
    "weights_table",
]
