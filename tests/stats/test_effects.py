"""Effects over pairs and their t-intervals."""

import math

import numpy as np
import pytest
from scipy import stats

from noisekit.core.errors import UsageError
from noisekit.core.results import Status
from noisekit.stats import contrast, paired_effect
from tests.reference.stats import paired_t_interval


@pytest.fixture
def arms() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    shared = generator.normal(0.0, 1.0, 10)
    treatment = np.exp(shared + generator.normal(0.4, 0.2, 10))
    return treatment, np.exp(shared)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_difference_interval_is_scipys_paired_t(arms, level: float) -> None:
    """Catches: an unpaired standard error; a normal quantile; n in the variance."""
    got = paired_effect(*arms).interval(level)
    low, high = paired_t_interval(*arms, level)
    assert got.low == pytest.approx(low, rel=1e-12)
    assert got.high == pytest.approx(high, rel=1e-12)


def test_ratio_interval_is_the_exponentiated_t_interval_of_logs(arms) -> None:
    """Catches: a ratio of arithmetic means; an interval left on the log scale."""
    effect = paired_effect(*arms, scale="ratio")
    low, high = paired_t_interval(np.log(arms[0]), np.log(arms[1]), 0.95)
    assert effect.effect == pytest.approx(stats.gmean(arms[0]) / stats.gmean(arms[1]))
    assert effect.interval().low == pytest.approx(math.exp(low), rel=1e-12)
    assert effect.interval().high == pytest.approx(math.exp(high), rel=1e-12)


def test_exchanging_the_arms_inverts_the_ratio(arms) -> None:
    """Catches: an interval that is symmetric about the ratio, not about its log."""
    there = paired_effect(*arms, scale="ratio")
    back = paired_effect(*arms[::-1], scale="ratio")
    assert there.interval().low == pytest.approx(1 / back.interval().high, rel=1e-12)
    assert there.p_value == pytest.approx(back.p_value, rel=1e-12)


@pytest.mark.parametrize("shift", [-0.8, -0.1, 0.0, 0.2, 0.9])
def test_p_value_is_scipys_paired_t_test(shift: float) -> None:
    """Catches: one tail; a normal quantile; a test against the margin."""
    first, second = np.random.default_rng(3).normal(shift, 0.3, (2, 8))
    want = stats.ttest_rel(first, second).pvalue
    assert paired_effect(first, second).p_value == pytest.approx(want, rel=1e-9)


def test_p_value_and_interval_agree_on_every_data_set() -> None:
    """Catches: a p-value at other degrees of freedom than the interval's."""
    generator = np.random.default_rng(11)
    for shift in np.linspace(-1.0, 1.0, 201):
        effect = paired_effect(generator.normal(shift, 0.4, 6), np.zeros(6))
        assert (effect.p_value < 0.02) == (not effect.interval(0.98).contains(0.0))


@pytest.mark.parametrize("num_pairs", [2, 5, 10])
@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_coverage_is_the_level_at_few_pairs(num_pairs: int, scale: str) -> None:
    """2,000 normal data sets; within 3.5 Monte-Carlo standard errors of 95 %.

    Catches: normal quantiles (88 % at n = 5); percentile bootstrap (84 %).
    """
    generator = np.random.default_rng(20 + num_pairs)
    draws = generator.normal(0.3, 0.7, (2000, num_pairs))
    truth = 0.3 if scale == "difference" else math.exp(0.3)
    first = draws if scale == "difference" else np.exp(draws)
    second = np.zeros(num_pairs) if scale == "difference" else np.ones(num_pairs)
    hits = [
        paired_effect(row, second, scale=scale).interval().contains(truth)
        for row in first
    ]
    assert abs(np.mean(hits) - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_pairs_that_agree_exactly_give_no_certainty(scale: str) -> None:
    """Catches: an interval of zero width, p = 0 and a verdict from no spread at all."""
    first = np.array([0.3, 0.1 + 0.2, 0.3, 0.3])  # equal up to rounding
    effect = paired_effect(first, np.full(4, 0.2), scale=scale)
    assert effect.estimate.status is Status.NOT_RESOLVED
    assert not effect.interval().bounded
    assert effect.interval().high == math.inf
    assert effect.p_value == 1.0


def test_a_small_but_real_spread_is_kept() -> None:
    """Catches: an absolute threshold that calls small quantities constant."""
    effect = paired_effect(np.array([1e-9, 2e-9, 3e-9]), np.zeros(3))
    assert effect.estimate.status is Status.OK
    assert effect.estimate.stderr == pytest.approx(1e-9 / math.sqrt(3))


@pytest.mark.parametrize(
    ("first", "second", "scale", "message"),
    [
        ([1.0], [2.0], "difference", "at least 2 pairs, got 1; run more seeds"),
        ([], [], "difference", "at least 2 pairs, got 0"),
        ([1.0, 2.0], [1.0], "difference", r"equal length, got shapes \(2,\) and \(1,"),
        ([1.0, math.nan], [1.0, 2.0], "difference", "finite, got 1 of 2 pairs with Na"),
        ([1.0, 2.0], [math.inf, 2.0], "difference", "finite, got 1 of 2 pairs"),
        ([1.0, -2.0], [1.0, 2.0], "ratio", r"positive values, got 1 of 2 pairs .*-2"),
        ([1.0, 2.0], [1.0, 0.0], "ratio", "at or below zero .*scale='difference'"),
    ],
)
def test_what_has_no_paired_effect_is_refused(first, second, scale, message) -> None:
    """Catches: NaN means; a logarithm of a negative value; silently dropped pairs."""
    with pytest.raises(UsageError, match=message):
        paired_effect(first, second, scale=scale)


@pytest.mark.parametrize(
    ("scale", "margin", "message"),
    [
        ("ratio", 1.0, "margin above 1 for a ratio, got 1; give the smallest ratio"),
        ("ratio", 0.5, "above 1 for a ratio, got 0.5"),
        ("difference", 0.0, "margin above 0 for a difference, got 0"),
        ("difference", math.inf, "finite margin above 0 for a difference, got inf"),
        ("difference", math.nan, "finite margin above 0 for a difference, got nan"),
    ],
)
def test_margins_that_mean_nothing_are_refused(scale, margin, message) -> None:
    """Catches: a difference's margin used for a ratio."""
    with pytest.raises(UsageError, match=message):
        contrast(
            name="a",
            quantity="lambda_max",
            treatment="large",
            reference="small",
            snapshot="final",
            scale=scale,
            margin=margin,
        )
