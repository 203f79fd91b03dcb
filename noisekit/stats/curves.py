"""Curves of several runs on a common grid."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from noisekit.core.errors import UsageError


def on_grid(x: ArrayLike, y: ArrayLike, grid: ArrayLike) -> NDArray[np.float64]:
    """Return a run's values at the points of a grid, linear between its own points.

    Outside the run's own range the value is NaN: a run that stopped early has no value
    later, least of all its last one.

    Args:
        x: Positions, strictly increasing.
        y: Values there; finite.
        grid: Positions wanted.

    Raises:
        UsageError: If the rows differ in length, are empty, not increasing or not
            finite.

    Example:
        >>> on_grid([0.0, 2.0], [1.0, 3.0], [-1.0, 0.0, 0.5, 2.0]).tolist()
        [nan, 1.0, 1.5, 3.0]
    """
    positions, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if positions.ndim != 1 or positions.shape != values.shape or not positions.size:
        raise UsageError(
            "a curve needs two rows of equal length with at least one point, got "
            f"shapes {positions.shape} and {values.shape}."
        )
    if not bool(np.isfinite(positions).all() and np.isfinite(values).all()):
        raise UsageError(
            "a curve needs finite values, got NaN or infinity; cut it there."
        )
    if bool(np.any(np.diff(positions) <= 0.0)):
        raise UsageError(
            "a curve needs strictly increasing positions, got some that fall or "
            "repeat; sort by position and keep one value each."
        )
    wanted = np.asarray(grid, np.float64)
    return np.interp(wanted, positions, values, left=math.nan, right=math.nan)


def common_grid(
    positions: Sequence[ArrayLike], *, num_points: int = 200
) -> NDArray[np.float64]:
    """Return evenly spaced positions over the range that all runs cover.

    Args:
        positions: Each run's own positions.
        num_points: Points of the grid.

    Raises:
        UsageError: If there are no runs, no common range or under 2 points.
    """
    rows = [np.asarray(row, np.float64) for row in positions]
    if not rows or any(row.size == 0 for row in rows):
        raise UsageError("a common grid needs at least one point of at least one run.")
    start = max(float(row.min()) for row in rows)
    stop = min(float(row.max()) for row in rows)
    if stop <= start or num_points < 2:
        raise UsageError(
            "a common grid needs a range that all runs cover and at least 2 points, "
            f"got {start:g} to {stop:g} and {num_points} points; leave out runs that "
            "stopped early, and say so."
        )
    return np.linspace(start, stop, num_points)


def curves_fault(table: NDArray[np.float64], level: float) -> str:
    """Return what is wrong with a table of curves or a level, or nothing."""
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 1:
        return (
            "needs one row per run and one column per point, with at least 2 runs, got "
            f"shape {table.shape}."
        )
    if not 0.0 < level < 1.0:
        return f"needs a level between 0 and 1, got {level}."
    return ""
