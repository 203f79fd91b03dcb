"""Learning rates as functions of the position."""

import math

import pytest
from pydantic import JsonValue

from noisekit.train.recipes.clock import Position
from tests.train.run_specs import run_spec


def rates(schedule: JsonValue, updates: list[int]) -> list[float]:
    """Return the rates of some updates of a run of 100, in batches of 16."""
    spec = run_spec(
        optimizer={"learning_rate": 2.0},
        schedule=schedule,
        training={"stop": {"updates": 100}},
    )
    factor = spec.schedule.factor(spec.clock)
    places = [Position(n, 16 * n, 16 * n) for n in updates]
    return [spec.optimizer.learning_rate * factor(place) for place in places]


def test_constant() -> None:
    """Catches: a schedule where none is asked for."""
    assert rates({"name": "constant"}, [0, 50, 99]) == [2.0, 2.0, 2.0]


def test_warmup_rises_to_the_rate_and_stays() -> None:
    """Linear from the stated factor; the rate is reached at the end of the length.

    Catches: a first update at rate zero; one update too many of warm-up.
    """
    warmup: JsonValue = {"length": {"updates": 3}, "start": 0.25}
    found = rates({"warmup": warmup}, [0, 1, 2, 3, 4])
    assert found == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0], rel=1e-15)


@pytest.mark.parametrize("length", [{"epochs": 2.5}, {"share": 0.2}])
def test_warmup_of_epochs_or_a_share(length: JsonValue) -> None:
    """20 updates either way: 128 examples in batches of 16, 100 updates in all.

    Catches: a length in updates whatever its unit.
    """
    schedule: JsonValue = {"warmup": {"length": length, "start": 0.0}}
    assert rates(schedule, [0, 10, 19, 20]) == pytest.approx([0.0, 1.0, 1.9, 2.0])


def test_steps_at_shares_updates_and_epochs() -> None:
    """Catches: shares read as updates; a milestone one update late."""
    schedule: JsonValue = {
        "name": "step",
        "milestones": [{"share": 0.5}, {"updates": 80}, {"epochs": 11.5}],
        "gamma": 0.5,
    }
    found = rates(schedule, [49, 50, 79, 80, 91, 92])
    assert found == [2.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_cosine_falls_from_the_rate_to_zero() -> None:
    """Catches: a cosine over the wrong length, or that begins during warm-up."""
    warmup: JsonValue = {"length": {"updates": 20}, "start": 0.05}
    found = rates({"name": "cosine", "warmup": warmup}, [20, 60, 99, 100])
    last = 1 + math.cos(math.pi * 79 / 80)
    assert found == pytest.approx([2.0, 1.0, last, 0.0], abs=1e-12)
    assert rates({"name": "cosine"}, [0, 50, 100]) == pytest.approx(
        [2.0, 1.0, 0.0], abs=1e-12
    )


def test_steps_at_intervals() -> None:
    """Catches: a first milestone at the start; an interval that drifts."""
    schedule: JsonValue = {"name": "step", "every": {"updates": 30}, "gamma": 0.5}
    assert rates(schedule, [0, 29, 30, 59, 60, 99]) == [2.0, 2.0, 1.0, 1.0, 0.5, 0.25]


def test_a_cycle_begins_anew() -> None:
    """Catches: a cycle that ends with its last factor."""
    schedule: JsonValue = {
        "name": "cycle",
        "factors": [1.0, 0.5, 0.25],
        "every": {"share": 0.1},
    }
    assert rates(schedule, [0, 9, 10, 20, 29, 30]) == [2.0, 2.0, 1.0, 0.5, 0.5, 2.0]


def test_a_polynomial_falls_to_zero_from_the_end_of_the_warm_up() -> None:
    """Catches: a power of the share behind; one that is squared twice."""
    assert rates({"name": "polynomial"}, [0, 25, 100]) == [2.0, 1.5, 0.0]
    warmup: JsonValue = {"length": {"updates": 20}, "start": 0.5}
    schedule: JsonValue = {"name": "polynomial", "power": 2.0, "warmup": warmup}
    assert rates(schedule, [0, 20, 60, 100]) == pytest.approx([1.0, 2.0, 0.5, 0.0])
