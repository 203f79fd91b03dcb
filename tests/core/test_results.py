"""Estimates, their intervals and how they are written."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Interval, Ratio, Status


def test_normal_interval_without_degrees_of_freedom() -> None:
    interval = Estimate(10.0, stderr=2.0).interval(0.95)
    assert interval.low == pytest.approx(10 - 1.959964 * 2, rel=1e-6)
    assert interval.high == pytest.approx(10 + 1.959964 * 2, rel=1e-6)
    assert interval.level == 0.95


def test_few_degrees_of_freedom_widen_the_interval() -> None:
    """Catches: a normal quantile for four seeds, a one-sided quantile."""
    interval = Estimate(0.0, stderr=1.0, dof=3).interval(0.9)
    assert interval.high == pytest.approx(stats.t.ppf(0.95, 3))
    assert interval.low == -interval.high


def test_residual_bound_encloses_at_any_level() -> None:
    """Catches: a solver's bound treated as a standard error."""
    estimate = Estimate(3.0, bound=0.5, error_source=ErrorSource.SOLVER)
    assert estimate.interval(0.5) == Interval(2.5, 3.5, 0.5)
    assert estimate.interval(0.99) == Interval(2.5, 3.5, 0.99)


def test_lower_bound_is_one_sided() -> None:
    interval = Estimate(3.0, side="lower").interval()
    assert (interval.low, interval.high) == (3.0, math.inf)


def test_mean_of_lower_bounds_is_less_its_error() -> None:
    """Catches: a lower end that ignores the error over what was averaged."""
    interval = Estimate(3.0, stderr=0.5, side="lower").interval()
    assert interval.low == pytest.approx(3 - 1.959964 * 0.5, rel=1e-6)
    assert interval.high == math.inf


def test_without_any_error_nothing_is_claimed() -> None:
    """Catches: a bare number with an interval of width zero."""
    interval = Estimate(3.0).interval()
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert not interval.bounded


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95.0])
def test_level_must_be_a_share(level: float) -> None:
    with pytest.raises(UsageError, match="level needs to be between 0 and 1, got"):
        Estimate(1.0, stderr=1.0).interval(level)


def test_fieller_of_a_certain_denominator_is_the_ordinary_interval() -> None:
    ratio = Ratio(6.0, 2.0, 0.04, 0.0, 0.0)
    low, high = ratio.confidence_set(1.96)
    assert (low, high) == pytest.approx((3 - 1.96 * 0.1, 3 + 1.96 * 0.1))


def inside(ratio: Ratio, value: float, quantile: float) -> bool:
    """Whether ``numerator - value * denominator`` is compatible with zero."""
    difference = ratio.numerator - value * ratio.denominator
    variance = (
        ratio.numerator_variance
        - 2 * value * ratio.covariance
        + value**2 * ratio.denominator_variance
    )
    return difference**2 <= quantile**2 * variance


@pytest.mark.parametrize(
    "ratio",
    [
        Ratio(6.0, 2.0, 0.5, 0.1, 0.05),
        Ratio(6.0, 2.0, 0.5, 0.1, -0.1),
        Ratio(6.0, 0.3, 0.5, 0.1, 0.02),
        Ratio(6.0, -0.3, 0.5, 0.1, 0.02),
        Ratio(0.1, 0.3, 0.5, 0.1, 0.02),
        Ratio(0.1, -0.3, 0.5, 0.1, -0.2),
        Ratio(6.0, -2.0, 0.5, 0.1, 0.0),
        Ratio(5.0, 0.0, 0.1, 1.0, 0.3),
        Ratio(1.0, -1.0, 1.0, 1.0, 0.99),
    ],
)
def test_fieller_set_is_all_ratios_that_are_not_rejected(ratio: Ratio) -> None:
    """Against its definition, value by value, over positive ratios.

    Where the set has positive members, its reported part contains all of them and,
    if it is an interval, no other.

    Catches: exchanged roots, a set that is bounded where the denominator is not
    resolved, a dropped covariance.
    """
    low, high = ratio.confidence_set(1.96)
    grid = np.geomspace(1e-3, 1e4, 20_001)
    members = np.array([inside(ratio, value, 1.96) for value in grid])
    reported = (grid >= low * (1 - 1e-9)) & (grid <= high * (1 + 1e-9))
    if members.any():
        assert (reported | ~members).all()
    if math.isfinite(high) and low > 0:
        assert np.array_equal(members, reported)


def test_unresolved_denominator_gives_an_unbounded_set() -> None:
    """Catches: the delta method, whose interval is finite and wrong here."""
    estimate = Estimate(20.0, ratio=Ratio(6.0, 0.3, 0.5, 0.1, 0.0))
    interval = estimate.interval(0.95)
    assert interval.high == math.inf
    assert 0 < interval.low < 20
    assert str(interval).startswith("more than")


def test_fieller_covers_where_the_delta_method_does_not() -> None:
    """A noisy denominator, 4,000 draws: 95 % within three standard errors.

    Catches: intervals by the ratio's own standard error, which cover less.
    """
    rng = np.random.default_rng(0)
    numerators = 8.0 + rng.standard_normal(4000)
    denominators = 1.0 + 0.4 * rng.standard_normal(4000)
    covered = 0
    for top, bottom in zip(numerators, denominators, strict=True):
        low, high = Ratio(top, bottom, 1.0, 0.16, 0.0).confidence_set(1.959964)
        covered += low <= 8.0 <= high
    assert covered / 4000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(1.23456, stderr=0.0456), "1.235 ± 0.046"),
        (Estimate(1.23456, bound=0.01), "1.235 (residual 0.01)"),
        (Estimate(1.5, side="lower"), "≥ 1.5"),
        (Estimate(1.5, stderr=0.25, side="lower"), "≥ 1.5 ± 0.25"),
        (Estimate(1.5), "1.5"),
        (Estimate(1.5, status=Status.NO_SIGNAL), "1.5 [no_signal]"),
        (
            Estimate(3.0, ratio=Ratio(6.0, 2.0, 0.04, 0.0, 0.0)),
            "3 [2.804, 3.196]",
        ),
    ],
)
def test_estimates_say_what_kind_of_error_they_have(
    estimate: Estimate, text: str
) -> None:
    """Catches: a solver's bound printed as plus-minus."""
    assert str(estimate) == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(1.0, 2.0, 0.95), "[1, 2]"),
        (Interval(800.0, math.inf, 0.95), "more than 800"),
        (Interval(-math.inf, 5.0, 0.95), "less than 5"),
        (Interval(-math.inf, math.inf, 0.95), "unbounded"),
    ],
)
def test_intervals_are_written_as_they_are(interval: Interval, text: str) -> None:
    assert str(interval) == text


def test_interval_contains_its_ends() -> None:
    interval = Interval(1.0, 2.0, 0.9)
    assert interval.contains(1.0)
    assert interval.contains(2.0)
    assert not interval.contains(2.1)


def test_what_holds_estimates_is_short() -> None:
    """Catches: the parts of a ratio printed wherever an estimate is held."""
    ratio = Ratio(2.0, 1.0, 0.1, 0.1, 0.0)
    assert repr(Estimate(2.5, stderr=0.1)) == "Estimate(2.5 ± 0.1)"
    assert len(repr([Estimate(2.0, ratio=ratio, num_samples=4)])) < 60


def test_estimates_are_numbers_that_cannot_be_changed() -> None:
    estimate = Estimate(2.5, stderr=0.1)
    assert float(estimate) == 2.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.value = 3.0  # type: ignore[misc]


def test_a_ratio_that_cannot_be_negative_has_no_negative_set() -> None:
    """Catches: a noise scale "between -54 and -30" where |G|² came out below zero."""
    below = Ratio(10.0, -0.3, 0.01, 1e-4, 0.0)
    assert below.confidence_set(1.96) == (0.0, math.inf)
    wide = Ratio(0.1, 1.0, 0.04, 1e-4, 0.0)
    low, high = wide.confidence_set(1.96)
    assert low == 0.0
    assert 0.3 < high < 0.7
    signed = Ratio(10.0, -0.3, 0.01, 1e-4, 0.0, signed=True)
    assert signed.confidence_set(1.96)[1] < 0
