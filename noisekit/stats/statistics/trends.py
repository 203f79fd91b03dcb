"""Slopes, fitted laws and rank correlations within each seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from noisekit.core.errors import UsageError
from noisekit.core.settings import PositiveInt
from noisekit.stats.rank import tau_b
from noisekit.stats.statistics.grids import best_of_grid
from noisekit.stats.statistics.lines import slope_of
from noisekit.stats.statistics.statistic import GroupNumbers, Statistic
from noisekit.stats.statistics.tables import (
    Tables,
    curves,
    group_runs,
    levels,
    one_per_seed,
    split_names,
    values_at,
    with_values,
)

TIME = "time"
"""What ``over`` names where a slope is along each run instead of between runs."""
_FEWEST = 2
_WIDEST = 1e6
"""Factor beyond the batch sizes of a grid at which a fitted hyperbola is a line."""


@dataclass(frozen=True, kw_only=True)
class Slope(Statistic):
    """The least-squares slope of a quantity, over a factor or along each run.

    Attributes:
        over: A factor, the ratio of two as in ``learning_rate/batch_size``, or
            ``time``.
        x: Along a run, the quantity on the other axis.
        log: Whether both axes are logarithmic.
        log_x: The same for the first axis alone.
        log_y: The same for the second axis alone.
        at: Snapshot at which the quantity is read, where it is not along a run.
        start: Along a run, the share of ``x`` before which nothing counts.
        stop: Along a run, the share of ``x`` after which nothing counts.
        population: Examples from which a batch is drawn without replacement; then the
            quantity is divided by ``1 - batch/population``, which makes the variance of
            an update linear in the batch size.
    """

    over: str
    x: str = "step"
    log: bool = False
    log_x: bool | None = None
    log_y: bool | None = None
    at: str = "final"
    start: float = 0.0
    stop: float = 1.0
    population: PositiveInt | None = None

    name: ClassVar[str] = "slope"
    moves: ClassVar[bool] = False

    @property
    def snapshot(self) -> str | None:
        """Where it is read."""
        return None if self.over == TIME else self.at

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        if not 0.0 <= self.start < self.stop <= 1.0:
            return (
                f"needs 0 <= start < stop <= 1, got {self.start:g} and {self.stop:g}."
            )
        return super().fault()

    @property
    def unit(self) -> str | None:
        """None: a slope is a ratio of two quantities."""
        return ""

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over."""
        return () if self.over == TIME else tuple(self.over.split("/"))

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return each seed's slope."""
        if self.over == TIME:
            lines = curves(tables, self.quantity, group=group, x=self.x)
            slopes = {
                run: self._slope(*self._part(*line)) for run, line in lines.items()
            }
            frame = with_values(group_runs(tables, group), slopes)
            return GroupNumbers(one_per_seed(frame, group=group))
        frame = values_at(tables, self.quantity, at=self.at, group=group)
        frame = frame.assign(x=factor_values(frame, self.over))
        if self.population is not None:
            left = 1.0 - frame["x"] / self.population
            frame["value"] = frame["value"] / left.where(left > 0)
        numbers = {}
        for seed, rows in frame.groupby("seed"):
            x, y = rows["x"].to_numpy(dtype=float), rows["value"].to_numpy(dtype=float)
            numbers[int(str(seed))] = self._slope(x, y)
        return GroupNumbers(numbers)

    def _part(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        low, high = float(x.min()), float(x.max())
        first, last = (low + share * (high - low) for share in (self.start, self.stop))
        kept = (x >= first) & (x <= last)
        if self._logs[0]:
            kept &= x > 0  # the place of the initial weights has no logarithm
        return x[kept], y[kept]

    @property
    def _logs(self) -> tuple[bool, bool]:
        given = (self.log_x, self.log_y)
        first, second = (self.log if log is None else log for log in given)
        return first, second

    def _slope(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):
            first, second = (
                np.log(values) if log else values
                for values, log in zip((x, y), self._logs, strict=True)
            )
        if not bool(np.isfinite(first).all() and np.isfinite(second).all()):
            return math.nan
        return slope_of(first, second)

    def words(self) -> str:
        """Return of which axes it is a slope."""
        first, second = self._logs
        over = self.x if self.over == TIME else self.over
        axes = f"log {over}" if first else over
        return f"slope of {'its log' if second else 'it'} on {axes}".replace("_", " ")


def factor_values(frame: pd.DataFrame, over: str) -> "pd.Series[float]":
    """Return the numbers of a factor, or of the ratio of two, one per run.

    Raises:
        UsageError: If the runs have no such factor, or it is not of numbers.
    """
    names = over.split("/")
    for name in names:
        levels(frame, name)
    columns = [pd.to_numeric(frame[name]).astype(float) for name in names]
    return columns[0] if len(columns) == 1 else columns[0] / columns[1]


@dataclass(frozen=True, kw_only=True)
class Fit(Statistic):
    """A constant of a law that is fitted within each seed.

    ``power``: the exponent p of ``a x^p``, by least squares of logarithms, over a
    factor. ``hyperbola``: the critical batch size of ``steps = least
    (1 + critical/B)``, by least squares of log steps; ``quantity`` is then ``step``,
    at a snapshot of equal loss.

    Attributes:
        model: The law.
        over: Factor on the x axis.
        at: Snapshot at which the quantity is read.
        best_over: Factor, such as ``learning_rate``, of which each seed's lowest value
            is taken first, at each level of ``over``.
        predicted: Quantity that the constant is divided by, such as
            ``simple_noise_scale``; its geometric mean over the seed's runs at ``at``.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, eq. 5.1.
    """

    model: Literal["power", "hyperbola"]
    over: str = "batch_size"
    at: str = "final"
    best_over: str = ""
    predicted: str = ""

    name: ClassVar[str] = "fit"
    moves: ClassVar[bool] = False

    @property
    def snapshot(self) -> str | None:
        """Where it is read."""
        return self.at

    @property
    def quantities(self) -> tuple[str, ...]:
        """What is fitted, and what is predicted."""
        return (self.quantity, self.predicted) if self.predicted else (self.quantity,)

    @property
    def unit(self) -> str | None:
        """None: an exponent, or what the factor counts."""
        return ""

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over."""
        return (self.over, *split_names(self.best_over))

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return each seed's constant."""
        frame = values_at(tables, self.quantity, at=self.at, group=group)
        numbers: dict[float, dict[int, float]] = {}
        reasons, there = [], levels(frame, self.over)
        for level in there:
            rows = frame[np.isclose(pd.to_numeric(frame[self.over]), level)]
            place = f"{group}/{self.over}={level:g}"
            if self.best_over:
                best = best_of_grid(rows, self.best_over, group=place)
                reasons += [best.not_comparable] if best.not_comparable else []
                numbers[level] = dict(best.values)
            else:
                numbers[level] = one_per_seed(rows, group=place)
        x = np.array(there)
        law = {"power": _exponent, "hyperbola": critical_batch_size}[self.model]
        scales = self._predictions(tables, group)
        constants = {
            seed: law(
                x, np.array([numbers[level].get(seed, math.nan) for level in there])
            )
            / scales.get(seed, 1.0)
            for seed in sorted({seed for row in numbers.values() for seed in row})
        }
        return GroupNumbers(constants, reasons[0] if reasons else None)

    def _predictions(self, tables: Tables, group: str) -> dict[int, float]:
        if not self.predicted:
            return {}
        frame = values_at(tables, self.predicted, at=self.at, group=group)
        frame = frame.assign(value=np.log(frame["value"].where(frame["value"] > 0)))
        means = frame.groupby("seed")["value"].mean()
        return {int(str(seed)): math.exp(value) for seed, value in means.items()}

    def words(self) -> str:
        """Return which constant of which law."""
        what = {"power": "exponent", "hyperbola": "critical value"}[self.model]
        over = self.over.replace("_", " ")
        below = f", over {self.predicted.replace('_', ' ')}" if self.predicted else ""
        return f"{what} of the {self.model} over {over}{below}"


def _exponent(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if not bool(np.isfinite(y).all() and (y > 0).all() and (x > 0).all()):
        return math.nan
    return slope_of(np.log(x), np.log(y))


def critical_batch_size(
    batch_sizes: NDArray[np.float64], steps: NDArray[np.float64]
) -> float:
    """Return the B where ``steps = least (1 + B/batch_size)`` fits best in logs.

    NaN where steps are missing, under 3 batch sizes, or no B fits: the steps do not
    fall with the batch size, or fall all the way as its inverse.

    Example:
        >>> sizes = np.array([8.0, 64.0, 512.0])
        >>> round(critical_batch_size(sizes, 100 * (1 + 50 / sizes)), 3)
        50.0
    """
    if len(batch_sizes) < 3 or not bool(np.isfinite(steps).all() and (steps > 0).all()):
        return math.nan
    logs = np.log(steps)
    low = math.log(float(batch_sizes.min()) / _WIDEST)
    high = math.log(float(batch_sizes.max()) * _WIDEST)

    def misfits(log_critical: NDArray[np.float64]) -> NDArray[np.float64]:
        excess = np.exp(log_critical)[:, None] / batch_sizes  # (tries, sizes)
        return np.asarray((logs - np.log1p(excess)).var(axis=1))

    def misfit(log_critical: float) -> float:
        return float(misfits(np.array([log_critical]))[0])

    # The misfit may be flat far away, so the search starts from the best of a grid.
    grid = np.linspace(low, high, 200)
    place = int(np.argmin(misfits(grid)))
    if place in (0, len(grid) - 1):
        return math.nan
    ends = (float(grid[place - 1]), float(grid[place + 1]))
    best = minimize_scalar(
        misfit, bounds=ends, method="bounded", options={"xatol": 1e-9}
    )
    return math.exp(float(best.x))


@dataclass(frozen=True, kw_only=True)
class Rank(Statistic):
    """How far two quantities are in the same order over the runs of a seed.

    Kendall's tau-b over all arms; or the granulated coefficient, which changes one
    factor at a time: the mean of tau over all settings of the other factors, then over
    factors, so that a factor that moves both quantities does not stand for the rest.

    Attributes:
        against: The other quantity.
        at: Snapshot at which both are read.
        over: Factors, with commas between, for the granulated coefficient.

    Source:
        Jiang et al. 2020, arXiv:1912.02178, section 4.
    """

    against: str = "test_error"
    at: str = "final"
    over: str = ""

    name: ClassVar[str] = "rank"
    moves: ClassVar[bool] = False
    scale: ClassVar[Literal["difference"]] = "difference"

    @property
    def snapshot(self) -> str | None:
        """Where both are read."""
        return self.at

    @property
    def quantities(self) -> tuple[str, ...]:
        """Both quantities."""
        return (self.quantity, self.against)

    @property
    def unit(self) -> str | None:
        """None: a coefficient."""
        return ""

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over."""
        return split_names(self.over)

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return each seed's coefficient; NaN where a quantity is the same in all."""
        axes = split_names(self.over)
        frame = values_at(tables, self.quantity, at=self.at, group=group)
        other = values_at(tables, self.against, at=self.at, group=group)
        frame = frame.assign(other=other["value"].to_numpy())
        missing = [axis for axis in axes if axis not in frame.columns]
        if missing:
            raise UsageError(
                "a rank statistic needs factors of the runs in over, got "
                f"{missing[0]!r}."
            )
        numbers = {
            int(str(seed)): _granulated(rows, axes) if axes else _tau(rows)
            for seed, rows in frame.groupby("seed")
        }
        return GroupNumbers(numbers)

    def words(self) -> str:
        """Return what it is ranked with."""
        kind = "granulated tau" if self.over else "Kendall's tau"
        return f"{kind} with {self.against.replace('_', ' ')}"


def _tau(rows: pd.DataFrame) -> float:
    there = rows[["value", "other"]].to_numpy(dtype=float)
    if len(there) < 4 or not bool(np.isfinite(there).all()):
        return math.nan
    return tau_b(there[:, 0], there[:, 1])


def _granulated(rows: pd.DataFrame, axes: Sequence[str]) -> float:
    if not bool(np.isfinite(rows[["value", "other"]].to_numpy(dtype=float)).all()):
        return math.nan
    by_axis = []
    for axis in axes:
        others = [name for name in axes if name != axis]
        parts = [part for _, part in rows.groupby(others)] if others else [rows]
        taus = [_concordance(part) for part in parts if len(part) >= _FEWEST]
        by_axis += [float(np.mean(taus))] if taus else []
    return float(np.mean(by_axis)) if by_axis else math.nan


def _concordance(rows: pd.DataFrame) -> float:
    """Pairs in the same order minus pairs in opposite order, over all pairs."""
    first, second = (rows[name].to_numpy(dtype=float) for name in ("value", "other"))
    signs = np.sign(np.subtract.outer(first, first) * np.subtract.outer(second, second))
    count = len(first)
    return float(signs.sum()) / (count * (count - 1))
