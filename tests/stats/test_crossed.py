"""Differences of test error over seeds and images, as crossed random effects."""

import math

import numpy as np
import pytest

from noisekit.stats import crossed_difference


def test_crossed_error_is_the_two_way_analysis_of_variance() -> None:
    """Hand-computed 2 x 3 table.

    Catches: mean squares over the wrong degrees of freedom; seeds and images exchanged.
    """
    first = np.array([[False, True, True], [False, False, True]])
    second = np.array([[True, True, True], [True, True, False]])
    # Excess errors: [[1, 0, 0], [1, 1, -1]]; every row has mean 1/3, so flip one more.
    second[0, 2] = False
    # Now [[1, 0, -1], [1, 1, -1]]: mean 1/6, seeds 0 and 1/3, images 1, 1/2 and -1.
    got = crossed_difference(first, second)
    mean_square_seeds = 3 * 2 * (1 / 6) ** 2 / 1
    mean_square_images = 2 * ((5 / 6) ** 2 + (1 / 3) ** 2 + (7 / 6) ** 2) / 2
    total = 1 + 0 + 1 + 1 + 1 + 1 - 6 * (1 / 6) ** 2
    mean_square_rest = (total - mean_square_seeds - 2 * mean_square_images) / 2
    variance = (mean_square_seeds + mean_square_images - mean_square_rest) / 6
    assert got.value == pytest.approx(1 / 6)
    assert got.stderr == pytest.approx(math.sqrt(variance))
    assert got.dof == pytest.approx((6 * variance / mean_square_seeds) ** 2)


def test_crossed_error_is_never_below_that_of_the_seeds() -> None:
    """Catches: a negative variance; images that disagree less than chance."""
    source = np.random.default_rng(15)
    for _ in range(200):
        first, second = source.random((2, 4, 12)) < 0.7
        per_seed = second.mean(axis=1) - first.mean(axis=1)
        got = crossed_difference(first, second)
        alone = float(per_seed.std(ddof=1)) / 2.0
        assert got.stderr is not None
        assert got.stderr >= alone * (1 - 1e-9)
