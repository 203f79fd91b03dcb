"""Learning-rate schedules: factors of the rate, as functions of the position alone.

A resumed run therefore needs no scheduler's state.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from noisekit.train.recipes.clock import Clock, Position
from noisekit.train.recipes.points import Length, Point
from noisekit.train.section import Section, kind_of

Factor = Callable[[Position], float]


class WarmupSpec(Section):
    """A linear rise of the rate at the beginning of training.

    Attributes:
        length: Where the rate reaches its full height.
        start: Factor of the first update.
    """

    length: Length
    start: Annotated[float, Field(ge=0, le=1)]


class ScheduleSection(Section):
    """How the learning rate changes.

    Attributes:
        name: Kind of decay.
        warmup: Rise at the beginning; its factor multiplies the decay's.
    """

    name: str
    warmup: WarmupSpec | None = None

    def factor(self, clock: Clock) -> Factor:
        """Return the factor of the rate as a function of the position."""
        decay = self.decay(clock)
        if self.warmup is None:
            return decay
        span, start = clock.span(self.warmup.length), self.warmup.start

        def warmed(position: Position) -> float:
            share = min(1.0, span.share(position))
            return (start + (1.0 - start) * share) * decay(position)

        return warmed

    @abstractmethod
    def decay(self, clock: Clock) -> Factor:
        """Return the factor without the warm-up's."""


class Constant(ScheduleSection):
    """The same rate throughout."""

    name: Literal["constant"] = "constant"

    def decay(self, clock: Clock) -> Factor:
        """Return 1 everywhere."""
        return lambda position: 1.0


class Step(ScheduleSection):
    """The rate is multiplied by ``gamma`` at each milestone.

    A milestone holds for the first update that begins at or after it.

    Attributes:
        milestones: Where.
        gamma: The factor of each.
    """

    name: Literal["step"] = "step"
    milestones: Annotated[tuple[Length, ...], Field(min_length=1)]
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _milestones_rise(self) -> Self:
        for key in ("updates", "epochs", "share"):
            stated = [getattr(point, key) for point in self.milestones]
            values = [value for value in stated if value is not None]
            if values != sorted(set(values)):
                raise ValueError("milestones need to rise")
        return self

    def decay(self, clock: Clock) -> Factor:
        """Return ``gamma`` to the power of the milestones passed."""
        spans = [clock.span(point) for point in self.milestones]

        def factor(position: Position) -> float:
            passed = sum(span.times(position) >= 1 for span in spans)
            return float(self.gamma**passed)

        return factor


class Cosine(ScheduleSection):
    """Half a cosine, from 1 at the end of the warm-up to 0 at the end of the run."""

    name: Literal["cosine"] = "cosine"

    def decay(self, clock: Clock) -> Factor:
        """Return the cosine of the share of training behind a position."""
        begin = 0.0 if self.warmup is None else _share_at(clock, self.warmup.length)

        def factor(position: Position) -> float:
            share = clock.end.share(position)
            if begin:
                share = max(0.0, (share - begin) / max(1e-9, 1.0 - begin))
            return 0.5 * (1.0 + math.cos(math.pi * share))

        return factor


def _share_at(clock: Clock, point: Point) -> float:
    """Return the share of the longest run at which a point of the same unit lies."""
    span = clock.span(point)
    pairs = ((span.updates, clock.end.updates), (span.cursor, clock.end.cursor))
    return max(length / end for length, end in pairs if math.isfinite(length))


ScheduleSpec = Annotated[
    Annotated[Constant, Tag("constant")]
    | Annotated[Step, Tag("step")]
    | Annotated[Cosine, Tag("cosine")],
    Discriminator(kind_of("constant")),
]
"""The table of schedules: a new one is a section with ``decay``, and a line here."""
