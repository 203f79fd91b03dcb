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
from noisekit.train.section import PositiveFloat, Section, kind_of

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

    @property
    def smooth(self) -> bool:
        """Whether the factor changes from update to update."""
        return False

    @property
    def places(self) -> tuple[Length, ...]:
        """Where the factor changes at once, or begins to follow another curve."""
        return () if self.warmup is None else (self.warmup.length,)

    @property
    def intervals(self) -> tuple[Length, ...]:
        """Distances of such places, counted from the start."""
        return ()

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
        every: Distance of milestones, in place of ``milestones``.
        gamma: The factor of each.
    """

    name: Literal["step"] = "step"
    milestones: tuple[Length, ...] = ()
    every: Length | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _milestones_are_stated_once(self) -> Self:
        if bool(self.milestones) == (self.every is not None):
            raise ValueError("needs either milestones or every")
        return self

    @model_validator(mode="after")
    def _milestones_rise(self) -> Self:
        for key in ("updates", "epochs", "share"):
            stated = [getattr(point, key) for point in self.milestones]
            values = [value for value in stated if value is not None]
            if values != sorted(set(values)):
                raise ValueError("milestones need to rise")
        return self

    @property
    def places(self) -> tuple[Length, ...]:
        """The milestones too."""
        return (*super().places, *self.milestones)

    @property
    def intervals(self) -> tuple[Length, ...]:
        """The milestones' distance."""
        return () if self.every is None else (self.every,)

    def decay(self, clock: Clock) -> Factor:
        """Return ``gamma`` to the power of the milestones passed."""
        if self.every is not None:
            interval = clock.span(self.every)
            return lambda position: float(self.gamma ** interval.times(position))
        spans = [clock.span(point) for point in self.milestones]

        def factor(position: Position) -> float:
            passed = sum(span.times(position) >= 1 for span in spans)
            return float(self.gamma**passed)

        return factor


class Cycle(ScheduleSection):
    """The rate is multiplied by one factor after the other, over and over.

    Attributes:
        factors: The factors, in order.
        every: How long each holds.
    """

    name: Literal["cycle"] = "cycle"
    factors: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]
    every: Length

    @property
    def intervals(self) -> tuple[Length, ...]:
        """How long each factor holds."""
        return (self.every,)

    def decay(self, clock: Clock) -> Factor:
        """Return the factor whose turn it is."""
        interval, factors = clock.span(self.every), self.factors
        return lambda position: factors[interval.times(position) % len(factors)]


class DecayToTheEnd(ScheduleSection):
    """A decay from the end of the warm-up to the end of the run."""

    @property
    def smooth(self) -> bool:
        """It does."""
        return True

    def decay(self, clock: Clock) -> Factor:
        """Return the factor at the share of the decay behind a position."""
        begin = 0.0 if self.warmup is None else _share_at(clock, self.warmup.length)

        def factor(position: Position) -> float:
            share = clock.end.share(position)
            if begin:
                share = max(0.0, (share - begin) / max(1e-9, 1.0 - begin))
            return self.factor_at(share)

        return factor

    @abstractmethod
    def factor_at(self, share: float) -> float:
        """Return the factor once a share of the decay is over."""


class Cosine(DecayToTheEnd):
    """Half a cosine, from 1 at the end of the warm-up to 0 at the end of the run."""

    name: Literal["cosine"] = "cosine"

    def factor_at(self, share: float) -> float:
        """Return the cosine."""
        return 0.5 * (1.0 + math.cos(math.pi * share))


class Polynomial(DecayToTheEnd):
    """``(1 - share) ** power``, from 1 at the end of the warm-up to 0 at the run's.

    Attributes:
        power: 1 is a line, 2 the decay of LARS (You et al. 2017, arXiv:1708.03888).
    """

    name: Literal["polynomial"] = "polynomial"
    power: PositiveFloat = 1.0

    def factor_at(self, share: float) -> float:
        """Return the power."""
        return float(max(0.0, 1.0 - share) ** self.power)


def _share_at(clock: Clock, point: Point) -> float:
    """Return the share of the longest run at which a point of the same unit lies."""
    span = clock.span(point)
    pairs = ((span.updates, clock.end.updates), (span.cursor, clock.end.cursor))
    return max(length / end for length, end in pairs if math.isfinite(length))


ScheduleSpec = Annotated[
    Annotated[Constant, Tag("constant")]
    | Annotated[Step, Tag("step")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[Polynomial, Tag("polynomial")]
    | Annotated[Cycle, Tag("cycle")],
    Discriminator(kind_of("constant")),
]
"""The table of schedules: a new one is a section with ``decay``, and a line here."""
