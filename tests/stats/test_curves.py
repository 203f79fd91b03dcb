"""Curves over runs: grids and bands."""

import math

import numpy as np
import pytest

from noisekit.core.errors import UsageError
from noisekit.stats import common_grid, curve_band, on_grid
from tests.reference.stats import paired_t_interval, walks


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


def test_pointwise_band_is_a_t_interval_at_each_point() -> None:
    """Also where runs are missing, and NaN where one run is left.

    Catches: population standard deviation; the count of all runs at every point.
    """
    curves = walks(1, (6, 4))
    curves[4:, 2] = math.nan
    curves[1:, 3] = math.nan
    band = curve_band(curves, level=0.9)
    for point, runs in ((0, 6), (1, 6), (2, 4)):
        column = curves[:runs, point]
        low, high = paired_t_interval(column, np.zeros(runs), 0.9)
        assert band.low[point] == pytest.approx(low)
        assert band.high[point] == pytest.approx(high)
    assert band.num_runs.tolist() == [6, 6, 4, 1]
    assert band.mean[3] == pytest.approx(curves[0, 3])
    assert math.isnan(band.low[3])


def test_simultaneous_band_covers_whole_curves() -> None:
    """500 sets of 10 curves of 50 points; the pointwise band misses in most of them.

    Catches: a pointwise band called simultaneous; a maximum over runs, not points.
    """
    generator = np.random.default_rng(2)
    whole = pointwise = 0
    for curves in walks(3, (500, 10, 50)):
        wide = curve_band(
            curves, kind="simultaneous", generator=generator, num_resamples=500
        )
        narrow = curve_band(curves)
        whole += bool(np.all((wide.low <= 0.0) & (wide.high >= 0.0)))
        pointwise += bool(np.all((narrow.low <= 0.0) & (narrow.high >= 0.0)))
    assert abs(whole / 500 - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 500)
    assert pointwise / 500 < 0.4


def test_points_where_all_runs_agree_have_no_width() -> None:
    """Catches: 0/0 in the t-values of a common starting point."""
    curves = walks(4, (8, 5))
    curves[:, 0] = 2.0
    band = curve_band(curves, kind="simultaneous", generator=np.random.default_rng(1))
    assert band.low[0] == band.high[0] == 2.0
    assert np.isfinite(band.high).all()


def test_two_runs_leave_the_whole_curve_unbounded_but_not_undefined() -> None:
    """Twenty pairs of runs that start together and differ by whole curves.

    Catches: infinity times zero at the start; t-values from rounding errors.
    """
    generator = np.random.default_rng(1)
    for seed in range(20):
        curves = walks(seed, (2, 5)) / 3.0
        curves[:, 0] = 2.0
        band = curve_band(curves, kind="simultaneous", generator=generator)
        assert band.low[0] == band.high[0] == 2.0
        assert np.isposinf(band.high[1:]).all()


def test_bands_that_cannot_be_had_are_refused() -> None:
    curves = walks(5, (4, 3))
    with pytest.raises(UsageError, match=r"at least 2 runs, got shape \(1, 3\)"):
        curve_band(curves[:1])
    with pytest.raises(UsageError, match="level between 0 and 1, got 95"):
        curve_band(curves, level=95)
    with pytest.raises(UsageError, match="whole curve needs generator="):
        curve_band(curves, kind="simultaneous")
    curves[1, 2] = math.nan
    with pytest.raises(UsageError, match="reach every point, got 1 that do not"):
        curve_band(curves, kind="simultaneous", generator=np.random.default_rng(1))
