"""Values at one snapshot: alone, of two groups, and differences of differences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from noisekit.stats.effects import Scale
from noisekit.stats.sample import SeedSample
from noisekit.stats.statistics.statistic import (
    GroupNumbers,
    Statistic,
    planned_seeds,
)
from noisekit.stats.statistics.tables import (
    ALL,
    Tables,
    one_per_seed,
    split_names,
    values_at,
)


@dataclass(frozen=True, kw_only=True)
class Value(Statistic):
    """A quantity at a snapshot.

    Attributes:
        at: Name of the snapshot.
        over: Factors, with commas between, whose levels are replicates of one another,
            such as the order of examples from one point: their mean is taken first,
            within each seed. ``*`` for whatever the runs of a group differ in.
        variant: Which setting of the measure; the first recorded if left out.
    """

    at: str = "final"
    over: str = ""
    variant: str | None = None

    name: ClassVar[str] = "value"
    _mean: ClassVar[str] = "mean"

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over."""
        return tuple(name for name in split_names(self.over) if name != ALL)

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return the quantity of each seed's run, or its mean over replicates."""
        frame = values_at(
            tables, self.quantity, at=self.at, group=group, variant=self.variant
        )
        over = split_names(self.over)
        return GroupNumbers(
            one_per_seed(frame, group=group, over=over, mean=self._mean)
        )

    @property
    def snapshot(self) -> str | None:
        """Where it is read."""
        return self.at

    def words(self) -> str:
        """Return nothing: a value needs no word beside its quantity."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Difference(Value):
    """A quantity of one group minus that of another, at a snapshot.

    Example:
        >>> Difference(quantity="test_error", treatment="large", reference="small").at
        'final'
    """

    name: ClassVar[str] = "difference"
    scale: ClassVar[Scale | None] = "difference"

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        return _without_reference(self) or super().fault()


@dataclass(frozen=True, kw_only=True)
class Ratio(Value):
    """A quantity of one group over that of another, at a snapshot.

    Replicates within a seed are averaged geometrically.
    """

    name: ClassVar[str] = "ratio"
    scale: ClassVar[Scale | None] = "ratio"
    _mean: ClassVar[str] = "geometric"

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        return _without_reference(self) or super().fault()


@dataclass(frozen=True, kw_only=True)
class Interaction(Value):
    """How far an effect depends on something else: a difference of differences.

    Treatment minus reference, less the same under another condition. On the scale
    ``"ratio"``, a ratio of ratios.

    Attributes:
        other_treatment: The treatment under the other condition.
        other_reference: The reference under the other condition.
    """

    other_treatment: str
    other_reference: str

    name: ClassVar[str] = "interaction"
    moves: ClassVar[bool] = False

    @property
    def groups(self) -> tuple[str, ...]:
        """All four groups."""
        return (*super().groups, self.other_treatment, self.other_reference)

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        missing = _without_reference(self) or super().fault()
        if missing or len(set(self.groups)) == len(self.groups):
            return missing
        return f"needs four different groups, got {', '.join(self.groups)}."

    def sample(self, tables: Tables, *, scale: Scale = "difference") -> SeedSample:
        """Return both effects by seed, the one under the other condition second."""
        parts = [self.of_group(tables, group).values for group in self.groups]
        first = _effects(parts[0], parts[1], scale)
        second = _effects(parts[2], parts[3], scale)
        return SeedSample.by_seed(
            first, second, seeds=planned_seeds(tables, self.groups)
        )

    def words(self) -> str:
        """Return that it is an interaction."""
        return f"less that of {self.other_treatment} against {self.other_reference}"


def _effects(
    above: Mapping[int, float], below: Mapping[int, float], scale: Scale
) -> dict[int, float]:
    """Return the effect of each seed that both groups have."""
    return {
        seed: _ratio(above[seed], below[seed])
        if scale == "ratio"
        else above[seed] - below[seed]
        for seed in above.keys() & below.keys()
    }


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def _without_reference(statistic: Statistic) -> str:
    if statistic.reference is not None and statistic.treatment:
        return ""
    return f"needs a treatment and a reference for {statistic.name!r}, got one group."
