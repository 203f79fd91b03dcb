"""First sustained crossings, and stalls."""

import math

import pytest

from noisekit.train.recipes.points import StalledSpec
from noisekit.train.runs.crossings import LossCrossing, StallWatch


def meanings(losses: list[float], *, sustain: int) -> list[str]:
    crossing, found = LossCrossing(0.5, sustain), []
    for loss in losses:
        crossing, meaning = crossing.after(loss)
        found.append(meaning)
    return found


def test_a_crossing_is_the_first_of_a_sustained_row() -> None:
    """A dip that does not last is dropped, the next one counts from its own start.

    Catches: the first touch of the level; counting evaluations that are not in a row;
    taking the weights of the confirming evaluation.
    """
    losses = [0.9, 0.4, 0.6, 0.5, 0.3, 0.2, 0.1, 0.9]
    assert meanings(losses, sustain=3) == [
        "above",
        "candidate",
        "above",
        "candidate",
        "pending",
        "sustained",
        "passed",
        "passed",
    ]


def test_without_sustaining_the_first_touch_is_taken() -> None:
    """Catches: a candidate that waits for an evaluation more than asked."""
    assert meanings([0.9, 0.5], sustain=1) == ["above", "sustained"]


def test_a_loss_that_is_no_number_is_above() -> None:
    """Catches: ``not loss > level``, which NaN satisfies."""
    assert meanings([math.nan, 0.4, math.nan], sustain=2) == [
        "above",
        "candidate",
        "above",
    ]


@pytest.fixture
def watch() -> StallWatch:
    return StallWatch.of(StalledSpec(patience_epochs=2.0, min_relative_decrease=0.1))


def test_a_loss_stalls_after_patience_without_enough_progress(
    watch: StallWatch,
) -> None:
    """Falls of less than the share of the best do not count, however many.

    Catches: comparing with the last loss, so that slow creeping is progress for ever.
    """
    stalled = []
    for epoch, loss in enumerate([1.0, 0.95, 0.91, 0.85]):
        watch = watch.after(loss, epoch=float(epoch))
        stalled.append(watch.stalled)
    assert stalled == [False, False, True, True]
    assert watch.best == 1.0


def test_progress_starts_patience_anew(watch: StallWatch) -> None:
    """Catches: patience counted from the start of training."""
    for epoch, loss in enumerate([1.0, 0.99, 0.5, 0.49, 0.44, 0.43]):
        watch = watch.after(loss, epoch=float(epoch))
        assert not watch.stalled
    assert watch.best == 0.44
    assert watch.after(0.42, epoch=6.0).stalled
