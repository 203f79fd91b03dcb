"""The largest gap between two arms' curves."""

import math

import numpy as np
import pytest

from noisekit.core.errors import UsageError
from noisekit.stats import permutation_band
from tests.reference.stats import max_flip_statistics, walks


@pytest.mark.parametrize("num_seeds", [3, 6, 8])
def test_exact_band_matches_every_exchange(num_seeds: int) -> None:
    """Catches: half of the exchanges; the maximum taken before the mean."""
    first, second = walks(6, (2, num_seeds, 7))
    got = permutation_band(first, second, generator=np.random.default_rng(1))
    want = max_flip_statistics(first - second)
    seen = float(np.abs((first - second).mean(axis=0)).max())
    assert got.exact
    assert got.num_assignments == 2**num_seeds
    assert got.max_difference == pytest.approx(seen)
    assert got.p_value == np.mean(np.array(want) >= seen - 1e-9)


def test_five_seeds_never_reach_five_percent() -> None:
    """All curves far apart: p is 2/32, and no gap passes an infinite threshold.

    Catches: p = 0 or 1/32 from leaving out the mirror image.
    """
    first = 100.0 + walks(7, (5, 6))
    got = permutation_band(first, np.zeros((5, 6)), generator=np.random.default_rng(1))
    assert got.p_value == 2 / 32
    assert got.threshold == math.inf


def test_null_curves_are_told_apart_in_five_percent() -> None:
    """800 null data sets; threshold and p-value agree in each.

    Catches: a band per point, which the largest of 30 points passes far more often.
    """
    generator = np.random.default_rng(8)
    found = 0
    for first, second in zip(
        walks(9, (800, 10, 30)), walks(10, (800, 10, 30)), strict=True
    ):
        got = permutation_band(first, second, generator=generator)
        assert (got.p_value <= 0.05) == (got.max_difference >= got.threshold - 1e-12)
        found += got.p_value <= 0.05
    # 2^10 exchanges come in mirrored pairs: the exact level is 50/1024.
    assert abs(found / 800 - 50 / 1024) < 3.5 * math.sqrt(0.05 * 0.95 / 800)


def test_drawn_exchanges_approximate_all_of_them() -> None:
    """Catches: the data themselves missing among the exchanges, so that p can be 0."""
    first, second = 0.4 + walks(11, (12, 9)), walks(12, (12, 9))
    generator = np.random.default_rng(2)
    exact = permutation_band(first, second, generator=generator)
    drawn = permutation_band(first, second, generator=generator, num_assignments=2000)
    assert exact.exact is True
    assert drawn.exact is False
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.04)
    assert drawn.threshold == pytest.approx(exact.threshold, rel=0.05)
    far = permutation_band(
        first + 1e3, second, generator=generator, num_assignments=2000
    )
    assert far.p_value >= 1 / 2000


def test_equal_curves_have_no_gap() -> None:
    """Catches: rounding that makes one of many equal gaps look like the largest."""
    curves = walks(13, (6, 5))
    got = permutation_band(curves, curves, generator=np.random.default_rng(1))
    assert got.p_value == 1.0
    assert got.max_difference == 0.0


def test_curves_that_are_not_paired_are_refused() -> None:
    curves, generator = walks(14, (4, 5)), np.random.default_rng(1)
    with pytest.raises(UsageError, match=r"both arms, got shapes \(4, 5\) and \(3, 5"):
        permutation_band(curves, curves[:3], generator=generator)
    with pytest.raises(UsageError, match="at least 2 assignments, got 1"):
        permutation_band(curves, curves, generator=generator, num_assignments=1)
    curves[0, 0] = math.nan
    with pytest.raises(UsageError, match="finite values, got 1 pairs of points"):
        permutation_band(curves, curves, generator=generator)
