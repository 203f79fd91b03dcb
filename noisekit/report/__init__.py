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
from noisekit.report.claim_words import answer, sentence
from noisekit.report.claims_result import claims_result
from noisekit.report.comparability import (
    budget_snapshots,
    correct_answers,
    fades_with_loss,
    is_rescaling_invariant,
    judged_claims,
    loss_ratio,
    needs_matched_loss,
    sample_of,
)
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
    gives_verdicts,
    numbers_by_arm,
    question,
    run_settings,
    setting_words,
    stated_claims,
)
from noisekit.report.results import AnalysisResult, Provenance, Rule, Table
from noisekit.report.rules import fair_test_rules
from noisekit.report.trial import build_trial

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
    "build_trial",
    "check_tables",
    "claims_result",
    "correct_answers",
    "curve_gap_table",
    "end_snapshot",
    "epsilon_table",
    "expected_sq_norm",
    "extreme_arms",
    "fades_with_loss",
    "fair_test_rules",
    "gives_verdicts",
    "image_error_table",
    "is_rescaling_invariant",
    "judged_claims",
    "loss_ratio",
    "matched_snapshots",
    "mean_and_spread",
    "measured_table",
    "needs_matched_loss",
    "norm_deviations",
    "numbers_by_arm",
    "own_loop_result",
    "provenance_of",
    "question",
    "rank_table",
    "ratio_table",
    "rows_by_arm",
    "run_settings",
    "same_network",
    "sample_of",
    "sentence",
    "setting_words",
    "stability_limits",
    "stated_claims",
    "weights_table",
]
