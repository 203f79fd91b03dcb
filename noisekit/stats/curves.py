"""Curves over runs: a common grid, and a band for their mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from noisekit.core.errors import UsageError

BandKind = Literal["pointwise", "simultaneous"]
"""Whether a band covers each point, or the whole curve, at its level."""


@dataclass(frozen=True, slots=True)
class CurveBand:
    """Mean curve over runs and a confidence band for it.

    Attributes:
        mean: Mean over the runs that have a value at a point; NaN where none has.
        low: Lower end; NaN where fewer than two runs have a value.
        high: Upper end; NaN likewise.
        num_runs: Runs behind each point: a mean over fewer is one over survivors.
        level: Confidence level.
        kind: What the level is of.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    num_runs: NDArray[np.intp]
    level: float
    kind: BandKind


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


def curve_band(
    curves: ArrayLike,
    *,
    level: float = 0.95,
    kind: BandKind = "pointwise",
    generator: np.random.Generator | None = None,
    num_resamples: int = 4000,
) -> CurveBand:
    """Return the mean curve over runs and a t-band for it.

    The pointwise band covers the true mean at each point at the level, and somewhere
    along a curve misses far more often. The simultaneous band is wider by one factor,
    from the largest t-value along the curve when the signs of whole residual curves
    are drawn at random, and covers the whole curve: a nominal 95 % band in 93 % at 5
    runs and 95 to 96 % from 10 on.

    Args:
        curves: One row per run, one column per grid point; NaN where a run has none.
        level: Confidence level.
        kind: ``"pointwise"`` or ``"simultaneous"``.
        generator: Source of signs; needed where ``kind`` is ``"simultaneous"``.
        num_resamples: Sign assignments drawn for the simultaneous band.

    Raises:
        UsageError: If there are fewer than 2 runs, the level is not in (0, 1), or a
            simultaneous band has no generator or a run with missing values.
    """
    table = np.asarray(curves, np.float64)  # (runs, points)
    fault = curves_fault(table, level)
    if not fault and kind == "simultaneous":
        fault = _simultaneous_fault(table, generator)
    if fault:
        raise UsageError(f"a band {fault}")
    present = np.isfinite(table)
    num_runs = present.sum(axis=0)  # (points,)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, table, 0.0).sum(axis=0) / num_runs
        squares = np.where(present, (table - mean) ** 2, 0.0).sum(axis=0)
        stderr = np.sqrt(squares / (num_runs - 1) / num_runs)
    quantile = np.full(mean.shape, math.nan)
    enough = num_runs > 1
    quantile[enough] = stdtrit(num_runs[enough] - 1.0, 0.5 + level / 2)
    if kind == "simultaneous" and generator is not None:
        largest = _largest_t(table - mean, generator, num_resamples)
        quantile = np.maximum(quantile, np.quantile(largest, level, method="higher"))
    with np.errstate(invalid="ignore"):
        half = np.where(stderr == 0.0, 0.0, quantile * stderr)
    return CurveBand(mean, mean - half, mean + half, num_runs, level, kind)


def _largest_t(
    residuals: NDArray[np.float64], generator: np.random.Generator, num_resamples: int
) -> NDArray[np.float64]:
    """Largest |t| along the curve for each random assignment of signs."""
    num_runs = residuals.shape[0]
    signs = generator.choice(np.array([-1.0, 1.0]), size=(num_resamples, num_runs))
    means = signs @ residuals / num_runs  # (resamples, points)
    # Squares do not depend on signs, so the flipped variance needs only the mean.
    squares = np.mean(residuals**2, axis=0)
    variance = (squares - means**2) / (num_runs - 1)
    variance[variance < 1e-12 * squares] = 0.0  # what is left of a full cancellation
    spread = np.sqrt(variance)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(means == 0.0, 0.0, np.abs(means) / spread)
    return np.asarray(ratios.max(axis=1), dtype=np.float64)


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


def _simultaneous_fault(
    table: NDArray[np.float64], generator: np.random.Generator | None
) -> str:
    if generator is None:
        return "over the whole curve needs generator=np.random.default_rng(seed)."
    missing = int(np.sum(~np.isfinite(table).all(axis=1)))
    if missing:
        return (
            f"over the whole curve needs runs that reach every point, got {missing} "
            "that do not; use a common grid."
        )
    return ""
