"""What all statistics have in common: groups of runs in, one number per seed out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from noisekit.core.settings import check_settings
from noisekit.stats.effects import Scale
from noisekit.stats.sample import SeedSample
from noisekit.stats.statistics.tables import Tables, group_runs


@dataclass(frozen=True, slots=True)
class GroupNumbers:
    """A statistic of one group of runs.

    Attributes:
        values: One number per seed; NaN where a seed's runs give none.
        not_comparable: Why the numbers may not be judged, if so.
        note: What the statistic chose or left out, in words.
    """

    values: Mapping[int, float] = field(default_factory=dict)
    not_comparable: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Statistic(ABC):
    """Maps the runs of one seed to one number; its fields are its settings.

    A subclass computes the number of one group. Where ``reference`` names a second
    group the claim compares both, by difference or as a ratio, as its scale says.

    Attributes:
        quantity: Name in the vocabulary.
        treatment: Group of runs, as ``"small"`` or ``"plain/batch_size=512"``; all
            runs if left out.
        reference: Group that it is compared with, if any.
    """

    quantity: str
    treatment: str = ""
    reference: str | None = None

    name: ClassVar[str]
    """What a recipe calls it."""
    scale: ClassVar[Scale | None] = None
    """The one scale that it can be judged on, if it is one."""
    moves: ClassVar[bool] = True
    """Whether it says that the quantity itself rose or fell between two groups."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_settings(self)

    @abstractmethod
    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return the statistic of one group of runs, by seed."""

    @abstractmethod
    def words(self) -> str:
        """Return what is computed in a few words, without the quantity."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of runs that it reads."""
        pair = (self.treatment, self.reference)
        return tuple(group for group in pair if group is not None)

    @property
    def snapshot(self) -> str | None:
        """Snapshot at which it reads quantities; ``None`` where it reads curves."""
        return None

    @property
    def quantities(self) -> tuple[str, ...]:
        """Quantities that it reads at ``snapshot``, or along the runs."""
        return (self.quantity,)

    @property
    def unit(self) -> str | None:
        """Unit of the number; ``None`` for the unit of the quantity."""
        return None

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it goes over, beside those that its groups name."""
        return ()

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        if self.reference is not None and self.reference == self.treatment:
            return f"needs two different groups, got {self.treatment!r} twice."
        return ""

    def sample(self, tables: Tables, *, scale: Scale = "difference") -> SeedSample:
        """Return the numbers that a claim is judged by.

        Args:
            tables: The runs.
            scale: Whether the claim compares by difference or as a ratio.

        Raises:
            UsageError: If the runs have no such group or factor.
        """
        above = self.of_group(tables, self.treatment)
        below = None
        if self.reference is not None:
            below = self.of_group(tables, self.reference)
        parts = [above] if below is None else [above, below]
        reasons = [part.not_comparable for part in parts if part.not_comparable]
        notes = dict.fromkeys(part.note for part in parts if part.note)
        return SeedSample.by_seed(
            above.values,
            None if below is None else below.values,
            seeds=planned_seeds(tables, self.groups),
            not_comparable=reasons[0] if reasons else None,
            note="; ".join(notes),
        )


def planned_seeds(tables: Tables, groups: Iterable[str]) -> tuple[int, ...]:
    """Return the seeds of all runs of some groups, also of those that gave nothing."""
    found = [group_runs(tables, group)["seed"] for group in groups]
    return tuple(sorted({int(seed) for seeds in found for seed in seeds}))
