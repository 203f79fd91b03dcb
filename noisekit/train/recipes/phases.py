"""Phases of a run: from a point on, other settings hold."""

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field, JsonValue

from noisekit.train.recipes.points import Point
from noisekit.train.recipes.tables import Table, flat, merged, nested
from noisekit.train.section import Section

CHANGEABLE = (
    "training.batch_size",
    "training.microbatch",
    "training.clip_norm",
    "training.terms",
    "augment",
    "optimizer",
    "schedule",
    "batch_policy",
)
"""What may change in mid-run, each with everything below it."""

_FIXED = ("optimizer.name",)


class PhaseSpec(Section):
    """From a point on, other settings hold; those of later phases lie on top.

    Phases begin one after the other: what a phase waits for counts once the one before
    has begun. It begins with the first update from the point on. The optimizer keeps
    its buffers, and points of schedules and policies are counted from the start of
    training as before.

    Attributes:
        at: Where it begins.
        set: What it sets, by dotted key.
    """

    at: Point
    set: Annotated[dict[str, JsonValue], Field(min_length=1)]

    @property
    def unchangeable(self) -> Iterator[str]:
        """Yield the keys that cannot change in mid-run."""
        for key in flat(self.set):
            allowed = any(f"{key}.".startswith(f"{may}.") for may in CHANGEABLE)
            if not allowed or key in _FIXED:
                yield key


def with_phase(table: Table, settings: Mapping[str, JsonValue]) -> Table:
    """Return the sections of a run with a phase's settings laid on.

    A section that is stated as a table with another ``name`` replaces the one before.
    """
    for key, value in settings.items():
        whole = isinstance(value, dict)
        table = merged(table, nested(key, value), replace_kinds=whole)
    return table
