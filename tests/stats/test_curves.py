"""Curves of several runs on a common grid."""

import math

import numpy as np
import pytest

from noisekit.core.errors import UsageError
from noisekit.stats import common_grid, on_grid


def test_interpolation_is_linear_and_never_extrapolates() -> None:
    """Catches: the last value of a stopped run carried on as if it trained."""
    got = on_grid([1.0, 2.0, 4.0], [10.0, 20.0, 0.0], [0.5, 1.0, 1.5, 3.0, 4.0, 5.0])
    np.testing.assert_array_equal(got, [math.nan, 10.0, 15.0, 10.0, 0.0, math.nan])


def test_common_grid_is_what_all_runs_cover() -> None:
    """Catches: the union of the ranges instead of their intersection."""
    grid = common_grid([[0.0, 5.0, 9.0], [2.0, 8.0], [1.0, 20.0]], num_points=4)
    np.testing.assert_allclose(grid, [2.0, 4.0, 6.0, 8.0])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.0, 1.0], [1.0], r"equal length .* got shapes \(2,\) and \(1,\)"),
        ([], [], "with at least one point"),
        ([0.0, 0.0], [1.0, 2.0], "strictly increasing positions, .* repeat; sort"),
        ([1.0, 0.0], [1.0, 2.0], "strictly increasing positions"),
        ([0.0, 1.0], [1.0, math.nan], "finite values, got NaN or infinity; cut it"),
    ],
)
def test_rows_that_are_no_curve_are_refused(x, y, message) -> None:
    """Catches: np.interp's silent nonsense on unsorted positions."""
    with pytest.raises(UsageError, match=message):
        on_grid(x, y, [0.5])


def test_grids_without_a_common_range_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"range that all runs cover .* got 2 to 1 and"
    ):
        common_grid([[0.0, 1.0], [2.0, 3.0]])
    with pytest.raises(UsageError, match="at least one point of at least one run"):
        common_grid([])
