"""Kendall's tau-b and its interval."""

import math

import numpy as np
import pytest
from scipy import stats

from noisekit.core.errors import UsageError
from noisekit.core.results import Status
from noisekit.stats import kendall_tau
from tests.reference.stats import jackknife_stderr, kendall_by_pairs


@pytest.mark.parametrize("values", [1000, 4], ids=["no ties", "ties"])
def test_tau_and_its_error_match_plain_loops(values: int) -> None:
    """Catches: tau-a under ties; a jackknife that removes a row and not its column."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        x = generator.integers(0, values, 15).astype(float)
        y = x + generator.integers(0, values, 15)
        got = kendall_tau(x, y)
        assert got.tau == pytest.approx(kendall_by_pairs(x, y), rel=1e-12)
        assert got.tau == pytest.approx(stats.kendalltau(x, y).statistic, rel=1e-12)
        assert got.p_value == pytest.approx(stats.kendalltau(x, y).pvalue)
        want = jackknife_stderr(x, y)
        assert got.transformed_stderr == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("num_points", [10, 30])
def test_interval_covers_the_true_tau(num_points: int, correlation: float) -> None:
    """1,000 normal data sets with tau = 2/pi asin(rho); never below 95 % but noise.

    Catches: Fieller's constant error far from its range (91 % at high tau).
    """
    generator = np.random.default_rng(num_points)
    truth = 2.0 / math.pi * math.asin(correlation)
    x = generator.normal(size=(1000, num_points))
    noise = generator.normal(size=(1000, num_points))
    y = correlation * x + math.sqrt(1.0 - correlation**2) * noise
    hits = [
        kendall_tau(a, b).interval().contains(truth) for a, b in zip(x, y, strict=True)
    ]
    assert np.mean(hits) > 0.95 - 3.5 * math.sqrt(0.95 * 0.05 / 1000)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_perfect_order_is_not_certainty(sign: float) -> None:
    """Ends solve (1 - t)^2 = 1.96^2 * 2 (1 - t^2) / n, which is t = (1 - k)/(1 + k).

    Catches: the interval [1, 1], or NaN from atanh(1).
    """
    x = np.arange(20.0)
    interval = kendall_tau(x, sign * x).interval()
    share = 2.0 * 1.959964**2 / 20
    inner = (1.0 - share) / (1.0 + share)
    ends = sorted([sign * inner, sign])
    assert [interval.low, interval.high] == pytest.approx(ends, rel=1e-6)


def test_interval_narrows_with_level_and_stays_in_range() -> None:
    """Catches: a symmetric interval that passes 1."""
    x = np.arange(12.0)
    y = x.copy()
    y[[0, 1, 5, 6]] = y[[1, 0, 6, 5]]
    got = kendall_tau(x, y)
    wide, narrow = got.interval(0.99), got.interval(0.5)
    assert -1.0 <= wide.low < narrow.low < got.tau < narrow.high < wide.high <= 1.0


def test_a_constant_row_has_no_tau() -> None:
    """Catches: a warning and NaN passed on as a value."""
    got = kendall_tau(np.ones(6), np.arange(6.0))
    assert math.isnan(got.tau)
    assert got.status is Status.UNAVAILABLE
    assert (got.interval().low, got.interval().high) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "at least 4 points, got 3"),
        ([1.0] * 5, [1.0] * 4, r"equal length, got shapes \(5,\) and \(4,\)"),
        ([1.0, 2.0, 3.0, math.nan], [1.0] * 4, "finite values, got 1 of 4 points"),
    ],
)
def test_rows_without_a_rank_correlation_are_refused(x, y, message) -> None:
    with pytest.raises(UsageError, match=message):
        kendall_tau(x, y)
    with pytest.raises(UsageError, match="level between 0 and 1, got 95"):
        kendall_tau(range(4), range(4)).interval(95)
