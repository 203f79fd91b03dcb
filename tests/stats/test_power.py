"""Half widths of intervals before any run, against scipy and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from noisekit.core.errors import UsageError
from noisekit.stats import half_width, paired_effect, pairs_needed


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("pairs", [2, 5, 10, 40])
def test_half_width_is_that_of_the_interval_it_announces(
    pairs: int, level: float
) -> None:
    """The interval of pairs with that spread is as wide, and scipy agrees.

    Catches: a normal quantile; n for n - 1; a one-sided level; the whole width.
    """
    values = np.random.default_rng(0).normal(size=pairs)
    values *= 0.3 / values.std(ddof=1)
    found = half_width(0.3, pairs, level=level)
    interval = paired_effect(values, np.zeros(pairs)).interval(level)
    assert found == pytest.approx((interval.high - interval.low) / 2)
    low, high = stats.t.interval(level, pairs - 1, scale=0.3 / math.sqrt(pairs))
    assert found == pytest.approx((high - low) / 2)


def test_one_pair_has_no_interval() -> None:
    """Catches: a quantile of no degrees of freedom."""
    assert half_width(0.3, 1) == math.inf


@pytest.mark.parametrize("width", [0.5, 0.1, 0.02])
def test_pairs_needed_are_the_fewest(width: float) -> None:
    """Catches: one pair too few, or too many."""
    needed = pairs_needed(0.1, width)
    assert needed is not None
    assert half_width(0.1, needed) <= width
    assert needed == 2 or half_width(0.1, needed - 1) > width


def test_a_spread_that_no_number_resolves() -> None:
    """Catches: an endless search."""
    assert pairs_needed(1.0, 1e-9) is None


@pytest.mark.parametrize("arguments", [(0.0, 5), (math.nan, 5), (-1.0, 5)])
def test_a_spread_has_to_be_positive(arguments: tuple[float, int]) -> None:
    """Catches: a half width of zero, which would resolve anything."""
    with pytest.raises(UsageError, match="half_width needs a positive standard"):
        half_width(*arguments)
