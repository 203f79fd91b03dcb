"""The clock of a run: where training is, and when a point is reached.

A run is a function of its position in an endless stream: one permutation of the
training examples after the other. Order, rate and epoch are read off the position, so
that none of them has a state of its own, and the batch size may change in mid-run.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from noisekit.core.errors import UsageError
from noisekit.train.recipes.points import Point

EpochEnd = Literal["divides", "drop", "ragged", "run_on"]

# Quotients like 0.3 * 96 / 28.8 are a few ulp off the whole number that they stand for.
_ROUNDING = 5e-10


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run has come.

    Attributes:
        updates: Optimizer steps taken.
        examples: Examples that entered a gradient, repeats counted.
        cursor: Place in the stream of permutations; it also counts the examples that
            ``epoch_end = "drop"`` leaves out.
    """

    updates: int = 0
    examples: int = 0
    cursor: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """A length of training from its start: whichever of two distances is shorter.

    Attributes:
        updates: Distance in optimizer steps.
        cursor: Distance in examples of the stream.
    """

    updates: float = math.inf
    cursor: float = math.inf

    def share(self, position: Position) -> float:
        """Return how much of the span lies behind ``position``; 1 is all of it."""
        return max(position.updates / self.updates, position.cursor / self.cursor)

    def times(self, position: Position) -> int:
        """Return how many whole spans lie behind ``position``."""
        return int(self.share(position) + _ROUNDING)

    def multiple(self, number: int) -> "Span":
        """Return the span ``number`` times as long."""
        return Span(self.updates * number, self.cursor * number)

    def due(self, before: Position, now: Position) -> bool:
        """Whether a whole number of spans was completed between two positions."""
        return self.times(now) > self.times(before)

    def reached(self, before: Position, now: Position) -> bool:
        """Whether the end of the span lies between two positions."""
        return self.times(now) >= 1 and self.times(before) == 0


@dataclass(frozen=True, slots=True)
class Horizon:
    """A stretch of training in which nothing that is stated in advance happens.

    Attributes:
        begin: Where it begins.
        updates: It ends before so many updates,
        cursor: and before this place in the stream.
    """

    begin: Position
    updates: float
    cursor: float

    @classmethod
    def at(
        cls, position: Position, *, once: Iterable[Span], repeated: Iterable[Span]
    ) -> "Horizon":
        """Return the stretch from a position on.

        Args:
            position: Where it begins.
            once: Spans at whose ends something happens.
            repeated: Spans at whose multiples something happens.
        """
        ahead = [span for span in once if span.times(position) == 0]
        ahead += [span.multiple(span.times(position) + 1) for span in repeated]
        return cls(
            position,
            min((_safely_before(span.updates) for span in ahead), default=math.inf),
            min((_safely_before(span.cursor) for span in ahead), default=math.inf),
        )

    def covers(self, position: Position) -> bool:
        """Whether a position lies in the stretch; those close to its end do not."""
        return (
            self.begin.updates <= position.updates < self.updates
            and position.cursor < self.cursor
        )


def _safely_before(distance: float) -> float:
    """Return a whole number that no rounding of a span's share can take beyond it."""
    if math.isinf(distance):
        return distance
    return math.floor(distance * (1 - 2 * _ROUNDING))


@dataclass(frozen=True, slots=True)
class Clock:
    """Advances positions, and translates points into spans.

    Attributes:
        num_examples: Training examples in one pass.
        epoch_end: What happens where a batch does not fit into the rest of a pass:
            it never happens (``divides``), the rest is left out (``drop``), the batch
            is smaller (``ragged``), or it takes the missing examples from the next
            permutation (``run_on``).
        end: The longest run that ``training.stop`` allows.
    """

    num_examples: int
    epoch_end: EpochEnd
    end: Span

    @classmethod
    def until(cls, stop: Point, *, num_examples: int, epoch_end: EpochEnd) -> "Clock":
        """Return the clock of a run that ends at ``stop`` at the latest."""
        end = Span(
            updates=math.inf if stop.updates is None else stop.updates,
            cursor=math.inf if stop.epochs is None else stop.epochs * num_examples,
        )
        return cls(num_examples, epoch_end, end)

    def span(self, point: Point) -> Span:
        """Return the span that ends at a point, as far as it is known in advance."""
        updates, cursor = math.inf, math.inf
        if point.share is not None:
            updates, cursor = (
                point.share * self.end.updates,
                point.share * self.end.cursor,
            )
        if point.updates is not None:
            updates = min(updates, point.updates)
        if point.epochs is not None:
            cursor = min(cursor, point.epochs * self.num_examples)
        return Span(updates, cursor)

    def epochs(self, position: Position) -> float:
        """Return the passes over the training data, complete and begun."""
        return position.cursor / self.num_examples

    def ended(self, position: Position) -> bool:
        """Whether ``training.stop`` allows no further update."""
        return self.end.times(position) >= 1

    def update(self, position: Position, batch_size: int) -> tuple[int, Position]:
        """Return where the next update's examples begin, and the position after it.

        Raises:
            UsageError: If ``divides`` is promised, and the batch does not.
        """
        begin, left = position.cursor, self._left(position.cursor)
        count = batch_size
        if batch_size > left and self.epoch_end != "run_on":
            if self.epoch_end == "divides":
                raise UsageError(
                    "training.epoch_end = 'divides' needs batches that fill each "
                    f"epoch, got one of {batch_size} where {left} examples are left; "
                    "use 'drop', 'ragged' or 'run_on'."
                )
            if self.epoch_end == "ragged":
                count = left
            else:  # a batch that has grown in mid-epoch
                begin += left
        cursor = begin + count
        if self.epoch_end == "drop" and self._left(cursor) < batch_size:
            cursor += self._left(cursor)
        after = Position(position.updates + 1, position.examples + count, cursor)
        return begin, after

    def equal_updates(
        self, position: Position, batch_size: int, horizon: "Horizon"
    ) -> int:
        """Return how many updates of one size begin before anything happens.

        That is, before the horizon and the end of the pass; at least 1.
        """
        whole = self._left(position.cursor) // batch_size - 1  # the last ends the pass
        updates = horizon.updates - position.updates
        examples = (horizon.cursor - position.cursor) // batch_size
        return int(max(1, min(whole, updates, examples)))

    def after_equal(self, position: Position, batch_size: int, count: int) -> Position:
        """Return the position after ``count`` such updates."""
        examples = count * batch_size
        return Position(
            position.updates + count,
            position.examples + examples,
            position.cursor + examples,
        )

    def updates_to(self, span: Span, batch_size: int) -> int:
        """Return the update that completes ``span`` where the batch size is constant.

        Limited to one more than the longest possible run.
        """
        if math.isinf(span.cursor):
            return _whole(span.updates)
        if self.epoch_end == "run_on":
            updates = _whole(span.cursor / batch_size)
        else:
            passes = int(span.cursor / self.num_examples + _ROUNDING)
            rest = span.cursor - passes * self.num_examples
            per_pass = self.num_examples / batch_size
            whole = int(per_pass) if self.epoch_end == "drop" else math.ceil(per_pass)
            updates = passes * whole + min(whole, _whole(rest / batch_size))
        if math.isinf(span.updates):
            return updates
        return min(updates, _whole(span.updates))

    def _left(self, cursor: int) -> int:
        """Return how many examples of the present pass lie behind the cursor."""
        return self.num_examples - cursor % self.num_examples


def _whole(number: float) -> int:
    return math.ceil(number - _ROUNDING)
