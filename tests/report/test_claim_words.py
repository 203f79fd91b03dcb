"""Sentences and the answer: they follow the table, and err as rarely as it does."""

import math

import numpy as np
import pytest

from noisekit.report import answer, sentence
from noisekit.stats import Claim, ClaimResult, SeedSample, Verdict, judge
from tests.report.planted import PLANTED, false_share
from tests.report.samples import ERROR, SHARPNESS, changed
from tests.report.samples import judged as six_pairs

ARMS = {"small": "batch 16", "large": "batch 128"}
LATER = changed(
    SHARPNESS, name="later", snapshot="loss_0.02", primary=False, description="later"
)


def judged(
    claim: Claim, ratio: float, spread: float = 0.05, **sample: str
) -> ClaimResult:
    """Judge a contrast by itself on ten pairs with this mean ratio and log spread."""
    noise = np.linspace(-1, 1, 10) * spread
    pairs = SeedSample(
        tuple(range(10)), tuple(ratio * np.exp(noise)), (1.0,) * 10, **sample
    )
    return judge([claim], {claim.name: pairs})[0]


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (2.4, "rose 2.40 × (95 % interval 2.34 to 2.46), more than the 1.5 × called"),
        (1.39, "rose 1.39 × (95 % interval 1.36 to 1.42), less than the 1.5 × called"),
        (0.5, "fell to 0.500 × (95 % interval 0.488 to 0.512), more than the 1.5 ×"),
        (0.8, "fell to 0.800 × (95 % interval 0.781 to 0.819), less than the 1.5 ×"),
        (1.0, "stayed within the 1.5 × called relevant: 1.00 × (95 % interval 0.976"),
        (1.5, "is not resolved against the 1.5 × called relevant: 1.50 × (95 % int"),
    ],
)
def test_each_verdict_has_its_own_words(ratio: float, words: str) -> None:
    """Catches: "did not go with" beside an interval that excludes no effect."""
    text = sentence(judged(SHARPNESS, ratio), ARMS).replace("\u202f", " ")
    assert text.startswith(
        "Batch 128 against batch 16: largest Hessian eigenvalue at training loss 0.05 "
    )
    assert words in text


def test_differences_are_told_in_points_without_a_second_sign() -> None:
    """Catches: "fell by −0.4 points"; fractions; no word that it is descriptive."""
    [result] = six_pairs(ERROR)
    assert sentence(result, ARMS) == (
        "Batch 128 against batch 16: test error at equal epochs fell by 0.400 points "
        "(95 % interval −0.466 to −0.334), less than the 0.5 points called relevant "
        "(descriptive)."
    )


def test_a_primary_verdict_is_not_told_without_what_contradicts_it() -> None:
    """Catches: "within the margin" as the whole answer above a row "2.39 x larger"."""
    results = [judged(SHARPNESS, 1.39), judged(LATER, 2.39)]
    text = answer(results, ARMS)
    assert "rose 1.39\u202f×" in text
    assert "Against this, by descriptive claims: " in text
    assert text.index("rose 1.39") < text.index("rose 2.39")


@pytest.mark.parametrize(("primary", "other"), [(2.0, 2.5), (1.0, 1.1), (1.2, 1.3)])
def test_descriptive_results_that_agree_are_only_counted(primary, other) -> None:
    """Catches: an answer as long as its table."""
    results = [judged(SHARPNESS, primary), judged(LATER, other)]
    text = answer(results, ARMS)
    assert "Against this" not in text
    assert f"Other descriptive claims: 1 {results[1].verdict}." in text


@pytest.mark.parametrize("other", [changed(LATER, quantity="weighted_hessian_trace")])
def test_another_measure_of_sharpness_may_contradict(other: Claim) -> None:
    """Catches: contradictions looked for under one name of a measure only."""
    text = answer([judged(SHARPNESS, 1.0), judged(other, 0.4)], ARMS)
    assert "Against this" in text


def test_an_error_does_not_contradict_a_sharpness() -> None:
    """Catches: contrasts of different kinds set against each other."""
    other = changed(LATER, quantity="test_error")
    text = answer([judged(SHARPNESS, 1.0), judged(other, 2.4)], ARMS)
    assert "Against this" not in text
    assert text.endswith("These runs cannot say whether sharpness causes the error.")


def test_an_undecided_primary_does_not_hide_what_is_decided() -> None:
    """Catches: "could not be compared" as the answer while the table has a verdict."""
    broken = judged(SHARPNESS, 9.0, not_comparable="losses are not matched")
    text = answer([broken, judged(LATER, 2.4)], ARMS)
    assert "could not be compared: losses are not matched" in text
    assert "rose 2.40\u202f×" in text


def test_runs_without_claims_get_no_verdict() -> None:
    """Catches: an answer from runs that claim nothing."""
    assert answer(six_pairs(SHARPNESS), ARMS, verdicts=False).startswith("No verdict")


def test_arms_and_setting_have_their_names() -> None:
    """Catches: ``large`` of the recipe; a setting that is lost."""
    text = answer([judged(SHARPNESS, 2.4)], ARMS, setting="digits, MLP")
    assert text.startswith("Digits, MLP.\nBatch 128 against batch 16: ")
    assert "large " not in text


@pytest.mark.parametrize("kind", PLANTED)
def test_answers_err_as_rarely_as_stated(kind: str) -> None:
    """100 planted sets of three primary contrasts each; at most 5 % have a false one.

    Each phrase of each answer is read back and compared with its verdict.

    Catches: no adjustment; a sentence from the point estimate; a contradiction that is
    left out.
    """
    limit = 0.05 + 3.0 * math.sqrt(0.05 * 0.95 / 100)
    assert false_share(kind, num_sets=100, seed=3) <= limit


def test_few_seeds_err_no_more_often() -> None:
    """Catches: a normal quantile in place of Student's at three seeds."""
    limit = 0.05 + 3.0 * math.sqrt(0.05 * 0.95 / 100)
    assert false_share("just beyond", num_sets=100, seed=4, num_seeds=3) <= limit


def test_large_effects_are_told() -> None:
    """Catches: a rule that never decides, which never errs."""
    verdicts = {
        str(judged(SHARPNESS, ratio).verdict) for ratio in (0.3, 0.8, 1, 1.3, 3)
    }
    assert verdicts == {str(verdict) for verdict in Verdict if verdict.decided}
