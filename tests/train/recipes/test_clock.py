"""The clock: positions, epoch ends, and when points are reached."""

import pytest
from pydantic import ValidationError

from noisekit.core.errors import UsageError
from noisekit.train.recipes.clock import Clock, EpochEnd, Position
from noisekit.train.recipes.points import Point, StalledSpec


def clock(
    epoch_end: EpochEnd = "divides", *, examples: int = 96, **stop: float
) -> Clock:
    point = Point.model_validate(stop or {"updates": 24})
    return Clock.until(point, num_examples=examples, epoch_end=epoch_end)


def walk(
    clock: Clock, sizes: list[int]
) -> tuple[list[tuple[int, int]], list[Position]]:
    """Return the stretches of the stream that batches see, and the positions."""
    position, stretches, positions = Position(), [], []
    for size in sizes:
        begin, after = clock.update(position, size)
        stretches.append((begin, after.examples - position.examples))
        positions.append(after)
        position = after
    return stretches, positions


def first_update(clock: Clock, size: int, **point: float) -> int:
    """Count updates until the point is reached, one by one."""
    span, position, update = clock.span(Point.model_validate(point)), Position(), 0
    while True:
        _, after = clock.update(position, size)
        update += 1
        if span.reached(position, after):
            return update
        position = after


def test_dropping_goes_on_with_the_next_pass() -> None:
    """10 examples in batches of 4: two batches, and two examples are left out.

    Catches: a pass that ends at the wrong place; dropped examples counted as seen;
    a pass that is complete only once the next has begun.
    """
    stretches, positions = walk(clock("drop", examples=10), [4] * 4)
    assert stretches == [(0, 4), (4, 4), (10, 4), (14, 4)]
    assert positions[1] == Position(updates=2, examples=8, cursor=10)
    assert positions[3] == Position(updates=4, examples=16, cursor=20)


def test_ragged_ends_a_pass_with_a_smaller_batch() -> None:
    """Catches: the last batch left out; the next pass begun too early."""
    stretches, positions = walk(clock("ragged", examples=10), [4] * 4)
    assert stretches == [(0, 4), (4, 4), (8, 2), (10, 4)]
    assert positions[3] == Position(updates=4, examples=14, cursor=14)


def test_running_on_takes_what_is_missing_from_the_next_pass() -> None:
    """Places 8, 9, 10, 11 of the stream: two of each permutation.

    Catches: a smaller batch at the end of a pass, under which an adaptive batch is
    not what was asked for.
    """
    stretches, positions = walk(clock("run_on", examples=10), [4] * 3)
    assert stretches == [(0, 4), (4, 4), (8, 4)]
    assert positions[2] == Position(updates=3, examples=12, cursor=12)


def test_the_batch_size_may_change_anywhere() -> None:
    """The cursor goes on; under ``drop`` a grown batch leaves the rest out.

    Catches: a position computed as update times batch size.
    """
    stretches, _ = walk(clock("run_on", examples=10), [2, 3, 7, 1])
    assert stretches == [(0, 2), (2, 3), (5, 7), (12, 1)]
    stretches, positions = walk(clock("drop", examples=10), [2, 9, 5])
    assert stretches == [(0, 2), (10, 9), (20, 5)]
    assert positions[-1].cursor == 25


def test_a_promise_that_batches_divide_is_kept() -> None:
    """Catches: a batch that is smaller than asked for, without a word."""
    with pytest.raises(UsageError, match="got one of 40 where 16 examples are left"):
        walk(clock("divides"), [40, 40, 40])


@pytest.mark.parametrize(
    ("epoch_end", "examples", "size", "point", "update"),
    [
        ("divides", 96, 8, {"updates": 7}, 7),
        ("divides", 96, 8, {"epochs": 2}, 24),
        ("divides", 96, 32, {"epochs": 2}, 6),
        ("divides", 96, 8, {"epochs": 0.3}, 4),  # 3.6: complete with the fourth
        ("divides", 96, 8, {"epochs": (0.1 + 0.2) / 0.3}, 12),  # an ulp above 1
        ("drop", 100, 32, {"epochs": 1}, 3),
        ("drop", 100, 32, {"epochs": 2.5}, 8),
        ("ragged", 100, 32, {"epochs": 1}, 4),
        ("ragged", 100, 32, {"epochs": 1.5}, 6),
        ("run_on", 100, 32, {"epochs": 1}, 4),
        ("run_on", 100, 32, {"epochs": 8}, 25),
        ("divides", 96, 8, {"share": 0.5}, 12),
        ("divides", 96, 8, {"share": 1.0}, 24),
        ("divides", 96, 8, {"updates": 7, "epochs": 0.5}, 6),
    ],
)
def test_a_point_is_reached_at_its_update(
    epoch_end: EpochEnd,
    examples: int,
    size: int,
    point: dict[str, float],
    update: int,
) -> None:
    """By walking, and as computed in advance for a constant batch size.

    Catches: epochs floored, or rounded up by an ulp; a ragged batch not counted; the
    two ways of computing it parted.
    """
    made = clock(epoch_end, examples=examples)
    assert first_update(made, size, **point) == update
    span = made.span(Point.model_validate(point))
    assert made.updates_to(span, size) == update


def test_a_share_is_one_of_the_longest_run() -> None:
    """Of the updates or of the passes that are allowed, whichever ends first.

    Catches: a share of updates where the run is bounded by epochs.
    """
    assert first_update(clock(epochs=4.0), 8, share=0.5) == 24
    both = clock(updates=10, epochs=4.0)
    assert first_update(both, 8, share=0.5) == 5
    assert first_update(both, 96, share=0.5) == 2
    assert both.ended(Position(10, 80, 80))
    assert both.ended(Position(4, 384, 384))
    assert not both.ended(Position(9, 383, 383))


def test_intervals_are_due_each_time() -> None:
    """Fractions of an epoch too, at the first update that completes each.

    Catches: intervals counted from the last due update, which drift.
    """
    made = clock(updates=24)
    span, due, position = made.span(Point(epochs=0.3)), [], Position()
    for update in range(1, 25):
        _, after = made.update(position, 8)
        if span.due(position, after):
            due.append(update)
        position = after
    assert due == [4, 8, 11, 15, 18, 22]


@pytest.mark.parametrize("stated", [{}, {"sustain": 2, "updates": 3}])
def test_a_point_needs_a_key(stated: dict[str, int]) -> None:
    """Catches: a point that is never reached; ``sustain`` without a loss."""
    with pytest.raises(ValidationError, match=r"needs one of|belongs to loss"):
        Point.model_validate(stated)


def test_keys_of_a_point_are_told_apart() -> None:
    """Catches: a loss or a stall taken for a place that is known in advance."""
    stalled = StalledSpec(patience_epochs=1.0)
    point = Point(updates=3, loss=0.5, sustain=2, stalled=stalled)
    assert point.keys == ("updates", "loss", "stalled")
    assert point.clock_points == {"updates": Point(updates=3)}
