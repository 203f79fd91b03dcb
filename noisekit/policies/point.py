"""Points and intervals in training, on any of its clocks."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Protocol

from annotated_types import Ge, Le

from noisekit.core.errors import UsageError
from noisekit.core.settings import Count, NonNegative, check_settings

_ROUNDING = 1e-12
"""Relative error allowed to a count of intervals, so that 0.3 is three times 0.1."""


class Position(Protocol):
    """How far training has come, where the next update starts."""

    @property
    def updates(self) -> int:
        """Updates taken."""

    @property
    def examples(self) -> int:
        """Examples that entered an update."""

    @property
    def epochs(self) -> float:
        """Passes over the data, parts of one included."""

    @property
    def share(self) -> float | None:
        """Share of the run, where its length is known."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class At:
    """A point in training, or the length of an interval, on one of its clocks.

    Exactly one clock is given. What is set at a point takes effect at the first update
    whose starting position has reached it.

    Attributes:
        updates: Optimizer updates taken.
        examples: Examples that entered an update.
        epochs: Passes over the training data; parts of a pass count.
        share: Share of the whole run, between 0 and 1.

    Raises:
        UsageError: If not exactly one clock is given, or it is out of bounds.

    Example:
        >>> import noisekit as nk
        >>> position = nk.Observation(updates=100, epochs=2.5)
        >>> nk.At(epochs=2).reached(position), nk.At(updates=40).count(position)
        (True, 2)
    """

    updates: Count | None = None
    examples: Count | None = None
    epochs: NonNegative | None = None
    share: Annotated[float, Ge(0), Le(1)] | None = None

    def __post_init__(self) -> None:
        """Check that there is one clock, within its bounds."""
        check_settings(self)
        given = [name for name in _CLOCKS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"At needs exactly one of {', '.join(_CLOCKS)}, got "
                f"{', '.join(given) or 'none'}; write At(epochs=20), for example."
            )

    @property
    def clock(self) -> str:
        """The name of its clock."""
        return next(name for name in _CLOCKS if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """The reading of its clock."""
        return float(getattr(self, self.clock))

    def now(self, position: Position) -> float:
        """Return what its clock reads at a position.

        Raises:
            UsageError: If it is a share of a run whose length is not known.
        """
        value: float | None = getattr(position, self.clock)
        if value is None:
            raise UsageError(
                f"{self} needs the length of the run, which is not known here; state "
                "the length, or use updates, examples or epochs."
            )
        return value

    def reached(self, position: Position) -> bool:
        """Whether an update that starts at the position is at or after this point."""
        return self.now(position) >= self.amount

    def count(self, position: Position) -> int:
        """Return how many intervals of this length have passed since the start."""
        return math.floor(self.now(position) / self.amount * (1 + _ROUNDING))

    def passed_since(self, then: float, position: Position) -> bool:
        """Whether an interval of this length has passed since the clock read ``then``.

        The start may be a rounded number, so that a rounding error is allowed.
        """
        now = self.now(position)
        return now - then >= self.amount - _ROUNDING * max(1.0, abs(now))

    def __repr__(self) -> str:
        """Write the one clock that is given."""
        return f"At({self.clock}={getattr(self, self.clock)!r})"

    def __str__(self) -> str:
        """Write the amount and its clock."""
        if self.share is not None:
            return f"{100 * self.share:g} % of the run"
        unit = self.clock.removesuffix("s") if self.amount == 1 else self.clock
        return f"{self.amount:g} {unit}"


_CLOCKS = tuple(field.name for field in fields(At))


def check_interval(name: str, interval: At | None) -> None:
    """Refuse an interval of no length.

    Raises:
        UsageError: If its amount is 0.
    """
    if interval is not None and interval.amount == 0:
        raise UsageError(f"{name} needs an interval longer than 0, got {interval}.")


def num_reached(position: Position, at: tuple[At, ...], every: At | None) -> int:
    """Return how many changes are due: at stated points, or at every interval."""
    if every is not None:
        return every.count(position)
    return sum(point.reached(position) for point in at)
