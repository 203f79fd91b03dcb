"""Statistics of curves: a tail's mean, the time to a value, the largest gap."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from noisekit.core.settings import Fraction, PositiveInt
from noisekit.stats.curves import common_grid, on_grid
from noisekit.stats.effects import Scale
from noisekit.stats.permutation import SimultaneousBand, permutation_band
from noisekit.stats.sample import SeedSample
from noisekit.stats.statistics.grids import best_of_grid
from noisekit.stats.statistics.statistic import (
    GroupNumbers,
    Statistic,
    planned_seeds,
)
from noisekit.stats.statistics.tables import (
    Tables,
    curves,
    group_runs,
    one_per_seed,
    reduced_tail,
    split_names,
    with_values,
)

Position = Literal["step", "examples_seen", "epoch"]
"""What a curve is followed along."""
_UNITS = {"step": "updates", "examples_seen": "examples", "epoch": "epochs"}


@dataclass(frozen=True, kw_only=True)
class TailMean(Statistic):
    """The mean of a quantity over the last share of each run.

    A run that diverged has none.

    Attributes:
        tail: Share of the run, from its end.
        x: What the share is one of.
        reduce: What is taken of the values there.
        over: Factors whose levels are replicates of one another.
    """

    tail: Fraction = 0.25
    x: Position = "step"
    reduce: Literal["mean", "median", "max"] = "mean"
    over: str = ""

    name: ClassVar[str] = "tail_mean"

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over."""
        return split_names(self.over)

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return the mean over the tail of each seed's run."""
        frame = reduced_tail(
            tables,
            self.quantity,
            group=group,
            x=self.x,
            tail=self.tail,
            reduce=self.reduce,
        )
        return GroupNumbers(
            one_per_seed(frame, group=group, over=split_names(self.over))
        )

    def words(self) -> str:
        """Return which part of the run."""
        return f"{self.reduce} over the last {100 * self.tail:g} % of the run"


@dataclass(frozen=True, kw_only=True)
class TimeTo(Statistic):
    """When a curve first stays at or below a value.

    A run that never does is censored: it has no time, and is counted in the note.

    Attributes:
        below: The value.
        x: What time is counted in.
        sustain: Points in a row at or below ``below`` that make a crossing.
        best_over: Factor of a grid, such as ``learning_rate``, of which each seed's
            shortest time is taken. Where that is at an end of the grid the times are
            *not comparable*, since a shorter one may lie beyond.
    """

    below: float
    x: Position = "step"
    sustain: PositiveInt = 1
    best_over: str = ""

    name: ClassVar[str] = "time_to"
    moves: ClassVar[bool] = False

    @property
    def unit(self) -> str | None:
        """What time is counted in."""
        return _UNITS[self.x]

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over."""
        return split_names(self.best_over)

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return the time of each seed, NaN where it is censored."""
        lines = curves(tables, self.quantity, group=group, x=self.x)
        times = {run: self._time(*line) for run, line in lines.items()}
        frame = with_values(group_runs(tables, group), times)
        censored = int(frame["value"].isna().sum())
        note = f"{censored} of {len(frame)} runs never got there" if censored else ""
        if not self.best_over:
            return GroupNumbers(one_per_seed(frame, group=group), note=note)
        return best_of_grid(frame, self.best_over, group=group, note=note)

    def _time(self, x: np.ndarray, y: np.ndarray) -> float:
        if self.sustain > len(y):
            return math.nan
        there = np.lib.stride_tricks.sliding_window_view(y <= self.below, self.sustain)
        crossings = np.flatnonzero(there.all(axis=1))
        # Reached once the last of the row has been seen.
        return float(x[crossings[0] + self.sustain - 1]) if crossings.size else math.nan

    def words(self) -> str:
        """Return what is reached, and in what it is counted."""
        return f"{_UNITS[self.x]} to {self.below:g}"


@dataclass(frozen=True, kw_only=True)
class CurveGap(Statistic):
    """The largest gap between the mean curves of two groups, anywhere along them.

    On the scale ``"ratio"`` it is the largest factor. It is never below no effect, so
    its interval comes from a band that holds along the whole curve, and *smaller*
    cannot be a verdict. The p-value is that of exchanging the groups within seeds.

    Attributes:
        x: What the curves are followed along.
        num_points: Points of the common grid, over the range that all runs cover.
    """

    x: Position = "epoch"
    num_points: PositiveInt = 200

    name: ClassVar[str] = "curve_gap"
    moves: ClassVar[bool] = False

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        if self.reference is None or not self.treatment:
            return "needs a treatment and a reference for 'curve_gap', got one group."
        return super().fault()

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return the mean height of each seed's curve, which no claim is judged by."""
        lines = curves(tables, self.quantity, group=group, x=self.x)
        heights = {run: float(np.mean(y)) for run, (_, y) in lines.items()}
        frame = with_values(group_runs(tables, group), heights)
        return GroupNumbers(one_per_seed(frame, group=group))

    def sample(self, tables: Tables, *, scale: Scale = "difference") -> SeedSample:
        """Return the gap of each seed where the mean gap is largest, and the band."""
        seeds = planned_seeds(tables, self.groups)
        above, below = (self._by_seed(tables, group) for group in self.groups)
        shared = sorted(above.keys() & below.keys())
        if len(shared) < 2:
            return SeedSample.by_seed({}, {}, seeds=seeds)
        lines = [above[seed] for seed in shared] + [below[seed] for seed in shared]
        grid = common_grid([x for x, _ in lines], num_points=self.num_points)
        table = np.array([on_grid(x, y, grid) for x, y in lines])
        if scale == "ratio":
            if table.min() <= 0:
                reason = "a curve has values at or below zero, which have no ratio"
                return SeedSample.by_seed({}, {}, seeds=seeds, not_comparable=reason)
            table = np.log(table)
        first, second = np.split(table, 2)
        test = permutation_band(first, second, generator=np.random.default_rng(0))
        place = int(np.argmax(np.abs(test.difference)))
        numbers = np.exp(table[:, place]) if scale == "ratio" else table[:, place]
        count = len(shared)
        return SeedSample.by_seed(
            dict(zip(shared, map(float, numbers[:count]), strict=True)),
            dict(zip(shared, map(float, numbers[count:]), strict=True)),
            seeds=seeds,
            band=SimultaneousBand(first - second, scale, test.p_value, place),
            note=f"largest at {self.x} {grid[place]:.4g}",
        )

    def _by_seed(
        self, tables: Tables, group: str
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        lines = curves(tables, self.quantity, group=group, x=self.x)
        runs = group_runs(tables, group)
        one_per_seed(with_values(runs, {}), group=group)  # refuses several per seed
        seed_of = dict(zip(map(str, runs["run_id"]), runs["seed"], strict=True))
        return {
            int(seed_of[run]): line for run, line in lines.items() if len(line[0]) > 1
        }

    def words(self) -> str:
        """Return that it is the largest gap."""
        return f"largest gap along the {_UNITS[self.x]}"
