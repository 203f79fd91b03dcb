"""Adjustment of p-values for several tests."""

import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from noisekit.core.errors import UsageError
from noisekit.stats import holm, pooled_adjustment
from tests.reference.stats import holm_by_rounds


def test_holm_rejects_what_its_rounds_reject() -> None:
    """Catches: no running maximum; factors in the wrong order; order not restored."""
    generator = np.random.default_rng(5)
    for _ in range(200):
        p_values = generator.uniform(0.0, 0.2, generator.integers(1, 8))
        adjusted = holm(p_values)
        for alpha in (0.01, 0.05, 0.1):
            want = holm_by_rounds(p_values, alpha)
            assert set(np.flatnonzero(adjusted <= alpha)) == want


def test_holm_known_values() -> None:
    """Catches: adjusted values above 1, or falling where the p-values rise."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0


@pytest.mark.parametrize("bad", [[0.1, math.nan], [-0.1], [1.2], [[0.1]]])
def test_what_is_no_p_value_is_refused(bad) -> None:
    """Catches: NaN that sorts last and is never rejected."""
    with pytest.raises(UsageError, match=r"Holm's method needs one row of p-values"):
        holm(bad)
    with pytest.raises(UsageError, match=r"pooled adjustment needs one row of p-val"):
        pooled_adjustment(bad, [0.1])


def test_pooled_adjustment_needs_both_tests_of_each_contrast() -> None:
    with pytest.raises(UsageError, match="per contrast, got 2 and 1"):
        pooled_adjustment([0.1, 0.2], [0.1])


@pytest.mark.parametrize("distance", [0.0, 0.3, 0.6, 1.0, 2.0])
def test_pooled_adjustment_holds_for_opposed_contrasts(distance: float) -> None:
    """Two contrasts with perfectly opposed errors, integrated, not simulated.

    The first lies ``distance`` beyond its margin, the second on its margin; wrongly
    calling either equivalent is a false verdict. The margins are wide, so no other
    error has any weight.

    Catches: counting the factor down over contrasts (5.5 % at distance 0.6).
    """
    margin = 50.0
    noise = ndtri((np.arange(4000) + 0.5) / 4000)
    errors = 0
    for z in noise:
        values = np.array([margin + distance + z, margin - z])
        beyond = 2.0 * ndtr(margin - values)
        inside = ndtr(values - margin)
        _, adjusted = pooled_adjustment(np.minimum(beyond, 1.0), inside)
        errors += bool((adjusted <= 0.05).any())
    assert errors / 4000 <= 0.05
