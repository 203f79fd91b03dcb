"""Statistics over a grid: its best level, the range that works, how far it varies."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from noisekit.core.settings import Positive
from noisekit.stats.effects import Scale
from noisekit.stats.statistics.lines import slope_of
from noisekit.stats.statistics.statistic import GroupNumbers, Statistic
from noisekit.stats.statistics.tables import (
    Tables,
    levels,
    one_per_seed,
    reduced_tail,
    values_at,
    with_values,
)


@dataclass(frozen=True, kw_only=True)
class _OfAGrid(Statistic):
    """What statistics over one factor of a grid share.

    Attributes:
        over: The factor, such as ``learning_rate``.
        at: Snapshot at which the quantity is read.
        tail: Share of the run, from its end, over whose evaluations the median is taken
            instead of the value at ``at``.
        diverged: What a run that diverged counts as, such as the error of guessing;
            without it, its seed has no number.
    """

    over: str = "learning_rate"
    at: str = "final"
    tail: float | None = None
    diverged: float | None = None

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over."""
        return (self.over,)

    @property
    def snapshot(self) -> str | None:
        """Where the quantity is read."""
        return self.at if self.tail is None else None

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        if self.tail is not None and not 0.0 < self.tail < 1.0:
            return f"needs a tail between 0 and 1, got {self.tail:g}."
        return super().fault()

    def cells(self, tables: Tables, quantity: str, group: str) -> pd.DataFrame:
        """Return a quantity by seed (rows) and level of the factor (columns)."""
        if self.tail is None:
            frame = values_at(tables, quantity, at=self.at, group=group)
            frame = with_values(
                frame,
                dict(zip(frame["run_id"].astype(str), frame["value"], strict=True)),
            )
        else:
            frame = reduced_tail(
                tables, quantity, group=group, tail=self.tail, reduce="median"
            )
        if self.diverged is not None and "status" in frame.columns:
            blown_up = frame["status"] == "diverged"
            frame.loc[blown_up, "value"] = self.diverged
        return by_level(frame, self.over, group=group)


def by_level(frame: pd.DataFrame, factor: str, *, group: str) -> pd.DataFrame:
    """Return ``value`` by seed (rows) and level of a factor (columns, increasing).

    Raises:
        UsageError: If the runs have no such factor, or a seed several runs at a level.
    """
    there = levels(frame, factor)
    columns = {}
    numbers = pd.to_numeric(frame[factor])
    for level in there:
        rows = frame[np.isclose(numbers, level, rtol=1e-9)]
        columns[level] = one_per_seed(rows, group=f"{group}/{factor}={level:g}")
    return pd.DataFrame(columns).sort_index()


def best_level(cells: pd.DataFrame) -> float:
    """Return the level with the lowest mean over seeds, of those without a gap; NaN."""
    means = cells.mean(axis=0, skipna=False)
    if means.isna().all():
        return math.nan
    return float(str(means.idxmin()))


def edge_fault(best: float, there: pd.Index, factor: str) -> str | None:
    """Return that the best level is at an end of the grid, if so."""
    words = factor.replace("_", " ")
    if math.isnan(best):
        return f"no {words} of the grid gave a value at every seed"
    if best in (there[0], there[-1]):
        return (
            f"the best {words}, {best:g}, is at an end of the grid "
            f"({there[0]:g} to {there[-1]:g}), so a better one may lie beyond"
        )
    return None


def best_of_grid(
    frame: pd.DataFrame, factor: str, *, group: str, note: str = ""
) -> GroupNumbers:
    """Return each seed's lowest value over a factor, and whether that was its end."""
    cells = by_level(frame, factor, group=group)
    lowest = cells.min(axis=1)
    best = best_level(cells)
    chosen = f"best {factor.replace('_', ' ')} {best:g}"
    return GroupNumbers(
        {int(str(seed)): float(value) for seed, value in lowest.items()},
        edge_fault(best, cells.columns, factor),
        "; ".join(part for part in (chosen, note) if part),
    )


@dataclass(frozen=True, kw_only=True)
class BestDifference(_OfAGrid):
    """A quantity of two groups, each at its best level of a grid.

    The level is chosen by ``select`` on data that are not judged, for each seed by the
    mean over the other seeds, so that no seed's own luck enters its choice; levels at
    which a run diverged are not chosen. Where the best level of all seeds is at an end
    of the grid the claim is *not comparable*.

    Attributes:
        select: Quantity whose lowest mean chooses; never one of the test data.
    """

    select: str = "validation_error"

    name: ClassVar[str] = "best_difference"

    @property
    def quantities(self) -> tuple[str, ...]:
        """What is compared, and what chooses."""
        return (self.quantity, self.select)

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        if self.select.startswith("test_"):
            return (
                f"needs select to be chosen on validation or training data, got "
                f"{self.select!r}; a level chosen on test data is no fair comparison."
            )
        if self.reference is None:
            return "needs a reference for 'best_difference', got one group."
        return super().fault()

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return each seed's value at the level that the others choose."""
        chooser = self.cells(tables, self.select, group)
        values = self.cells(tables, self.quantity, group)
        numbers = {}
        for seed in chooser.index:
            best = best_level(chooser.drop(index=seed))
            numbers[int(str(seed))] = (
                math.nan if math.isnan(best) else float(values[best].loc[seed])
            )
        best = best_level(chooser)
        words = self.over.replace("_", " ")
        return GroupNumbers(
            numbers,
            edge_fault(best, chooser.columns, self.over),
            f"{words} {best:g} chosen for {group or 'all runs'}",
        )

    def words(self) -> str:
        """Return at what it is compared."""
        chooser = self.select.replace("_", " ")
        return f"at the best {self.over.replace('_', ' ')} by {chooser}"


@dataclass(frozen=True, kw_only=True)
class RangeWidth(_OfAGrid):
    """How many octaves of a factor work: within a distance of the best.

    Levels next to each other around the best one, of which the quantity is at most
    ``within`` above the lowest; a run that diverged does not work. Where the range
    reaches an end of the grid it is only known from one side, and *not comparable*.

    Attributes:
        within: How far above the lowest value still works.
        end: Octaves from the lowest to the highest level that works, or log2 of one.
        against: A second factor; then the number is the slope of the above on its log2,
            in octaves per octave.
    """

    within: Positive
    end: Literal["width", "top", "bottom"] = "width"
    against: str = ""

    name: ClassVar[str] = "range_width"
    moves: ClassVar[bool] = False

    @property
    def unit(self) -> str | None:
        """Octaves, or a slope or a logarithm without a unit."""
        return "octaves" if self.end == "width" and not self.against else ""

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over."""
        return (self.over, self.against) if self.against else (self.over,)

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return the octaves of each seed, or their slope."""
        if not self.against:
            return self._octaves(self.cells(tables, self.quantity, group))
        runs = values_at(tables, self.quantity, at=self.at, group=group)
        there = levels(runs, self.against)
        prefix = f"{group}/" if group else ""
        rows = [
            self._octaves(
                self.cells(tables, self.quantity, f"{prefix}{self.against}={level!r}")
            )
            for level in there
        ]
        seeds = sorted({seed for row in rows for seed in row.values})
        x = np.log2(there)
        reasons = [row.not_comparable for row in rows if row.not_comparable]
        numbers = {
            seed: slope_of(
                x, np.array([row.values.get(seed, math.nan) for row in rows])
            )
            for seed in seeds
        }
        return GroupNumbers(numbers, reasons[0] if reasons else None)

    def _octaves(self, cells: pd.DataFrame) -> GroupNumbers:
        octaves = np.log2(cells.columns.to_numpy(dtype=float))
        numbers = {
            int(str(seed)): self._measure(octaves, row.to_numpy(dtype=float))
            for seed, row in cells.iterrows()
        }
        # A level works on average only where no seed's run is missing.
        low, high = _around_best(cells.mean(skipna=False).to_numpy(), self.within)
        ends = {"width": (low, high), "top": (high,), "bottom": (low,)}[self.end]
        reached = [end for end in ends if end in (0, len(octaves) - 1) or end < 0]
        reason = (
            f"the range of {self.over.replace('_', ' ')} that works reaches an end of "
            f"the grid ({cells.columns[0]:g} to {cells.columns[-1]:g})"
        )
        return GroupNumbers(numbers, reason if reached else None)

    def _measure(
        self, octaves: NDArray[np.float64], values: NDArray[np.float64]
    ) -> float:
        low, high = _around_best(values, self.within)
        if low < 0:
            return math.nan
        top, bottom = float(octaves[high]), float(octaves[low])
        return {"width": top - bottom, "top": top, "bottom": bottom}[self.end]

    def words(self) -> str:
        """Return what is counted."""
        what = {
            "width": "octaves",
            "top": "log2 of the highest",
            "bottom": "log2 of the lowest",
        }
        per = (
            f", per octave of {self.against.replace('_', ' ')}" if self.against else ""
        )
        return (
            f"{what[self.end]} of {self.over.replace('_', ' ')} within "
            f"{self.within:g} of the best{per}"
        )


def _around_best(values: NDArray[np.float64], within: float) -> tuple[int, int]:
    """Return the first and last place of the range that works; (-1, -1) for none."""
    if np.isnan(values).all():
        return -1, -1
    best = int(np.nanargmin(values))
    works = values <= values[best] + within  # False where NaN
    low = high = best
    while low > 0 and works[low - 1]:
        low -= 1
    while high < len(values) - 1 and works[high + 1]:
        high += 1
    return low, high


@dataclass(frozen=True, kw_only=True)
class Spread(_OfAGrid):
    """How far a quantity varies over a factor: the standard deviation over its levels.

    Attributes:
        log: Whether of logarithms.
    """

    log: bool = False

    name: ClassVar[str] = "spread"
    moves: ClassVar[bool] = False

    @property
    def unit(self) -> str | None:
        """That of the quantity, or none where it is of logarithms."""
        return "" if self.log else None

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return the standard deviation over levels, by seed."""
        cells = self.cells(tables, self.quantity, group)
        values = cells.to_numpy(dtype=float)  # (seeds, levels)
        if self.log:
            values = np.log(np.where(values > 0, values, np.nan))
        deviations = values.std(axis=1, ddof=1)
        return GroupNumbers(
            dict(zip(map(int, cells.index), map(float, deviations), strict=True))
        )

    def words(self) -> str:
        """Return over what it varies."""
        return f"spread over {self.over.replace('_', ' ')}"


@dataclass(frozen=True, kw_only=True)
class SpreadRatio(Spread):
    """How much more a quantity varies over a factor in one group than in another."""

    name: ClassVar[str] = "spread_ratio"
    moves: ClassVar[bool] = False
    scale: ClassVar[Scale | None] = "ratio"

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        if self.reference is None:
            return "needs a reference for 'spread_ratio', got one group."
        return super().fault()
