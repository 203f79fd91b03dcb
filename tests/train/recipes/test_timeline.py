"""Every change of a run, computed in advance: the papers' schedules from sections."""

import itertools
import math
import random
from typing import Any

import pytest
from pydantic import JsonValue

from noisekit.core.errors import UsageError
from noisekit.train.recipes.clock import Position
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.timeline import Change, stretches, timeline
from noisekit.train.recipes.update_plan import PlannedUpdate, UpdatePlan
from tests.train.run_specs import run_spec

DROPS: JsonValue = [{"epochs": 60}, {"epochs": 120}, {"epochs": 160}]


def paper(examples: int = 50_000, **sections: Any) -> RunSpec:
    """Return a run on as many examples as a paper has; nothing is ever read."""
    data = {"name": "gaussian", "train": examples, "validation": 8, "test": 8}
    every = {"every": {"epochs": 1}}
    return run_spec(**{"data": data, "evaluation": every, **sections})


def every_update(spec: RunSpec) -> list[PlannedUpdate]:
    """Return all updates, one by one, without the timeline's stretches."""
    plan, updates, position = UpdatePlan(spec), [], Position()
    state = plan.start()
    while not spec.clock.ended(position):
        state, update = plan.next(state, position)
        updates.append(update)
        position = update.after
    return updates


def found(spec: RunSpec) -> list[tuple[int | None, int | None, float]]:
    """Return update, batch size and rate of each row but the end."""
    return [
        (row.update, row.batch_size, round(row.learning_rate or 0.0, 12))
        for row in timeline(spec)[:-1]
    ]


def test_adabatch_doubles_the_batch_and_decays_the_rate_by_075() -> None:
    """AdaBatch, 128 examples, 0.1, a change every 20 of 100 epochs, N = 50,000.

    The baseline's 0.375, times 2 where the batch doubles, is 0.75.

    Catches: changes one update or one epoch late; rate changed but not the batch; a
    decay of 0.375 in place of 0.75; the linear rule on the batch at the start.
    """
    spec = paper(
        optimizer={"learning_rate": 0.1, "reference_batch": 128, "scaling": "linear"},
        training={
            "batch_size": 128,
            "epoch_end": "drop",
            "stop": {"epochs": 100},
        },
        schedule={"name": "step", "gamma": 0.375, "every": {"epochs": 20}},
        batch_policy={
            "name": "growth",
            "factor": 2,
            "every": {"epochs": 20},
            "max": 50_000,
        },
    )
    assert found(spec) == [
        (0, 128, 0.1),
        (7_800, 256, 0.075),
        (11_700, 512, 0.05625),
        (13_640, 1024, 0.0421875),
        (14_600, 2048, 0.031640625),
    ]
    per_example = [row.learning_rate / row.batch_size for row in timeline(spec)[:-1]]
    for earlier, later in itertools.pairwise(per_example):
        assert later / earlier == pytest.approx(0.375, rel=1e-12)


def smith(rate: float, batch: int, **sections: Any) -> RunSpec:
    momentum = sections.pop("momentum", 0.9)
    return paper(
        optimizer={"learning_rate": rate, "momentum": momentum, "nesterov": True},
        training={
            "batch_size": batch,
            "microbatch": 64,
            "epoch_end": "ragged",
            "stop": {"epochs": 200},
        },
        **sections,
    )


def decay(points: JsonValue) -> dict[str, JsonValue]:
    return {"schedule": {"name": "step", "gamma": 0.2, "milestones": points}}


def growth(points: JsonValue, most: int, beyond: str) -> dict[str, JsonValue]:
    policy: JsonValue = {
        "name": "growth",
        "factor": 5,
        "at": points,
        "max": most,
        "beyond": beyond,
    }
    return {"batch_policy": policy}


@pytest.mark.parametrize(
    ("spec", "updates"),
    [
        (smith(0.1, 128, **decay(DROPS)), 78_200),
        (
            smith(0.1, 128, **decay(DROPS[1:]), **growth(DROPS[:1], 50_000, "stay")),
            34_520,
        ),
        (smith(0.1, 128, **growth(DROPS, 50_000, "stay")), 29_000),
        (smith(0.5, 640, **growth(DROPS, 5_120, "rate")), 6_500),
        (smith(0.5, 3_200, momentum=0.98, **growth(DROPS, 5_120, "rate")), 2_360),
    ],
    ids=["decay", "hybrid", "grow", "grow fast", "grow fastest"],
)
def test_growing_in_place_of_decaying_takes_the_published_updates(
    spec: RunSpec, updates: int
) -> None:
    """Smith et al.: drops at 60, 120 and 160 of 200 epochs, by 5, N = 50,000.

    Catches: a ragged batch not counted; a cap that is not the cap; a cursor reset at a
    change, which ends each epoch elsewhere; a microbatch that grows with the batch.
    """
    rows = timeline(spec)
    assert rows[-1].update == updates
    assert rows[-1].epoch == 200
    assert rows[-1].reason == "end of the longest run"
    assert {row.microbatch for row in rows} == {64}
    assert spec.max_updates >= updates


def test_what_the_cap_forbids_the_rate_takes_over() -> None:
    """640 to 3,200, then 5,120 of 16,000 and of 80,000.

    Catches: growth beyond the cap forgotten; the rate divided by the factor itself.
    """
    spec = smith(0.5, 640, **growth(DROPS, 5_120, "rate"))
    assert found(spec) == [
        (0, 640, 0.5),
        (4_740, 3_200, 0.5),
        (5_700, 5_120, 0.16),
        (6_100, 5_120, 0.032),
    ]


def hoffer(**stop: float | None) -> RunSpec:
    return paper(
        32_768,
        optimizer={"learning_rate": 0.1, "reference_batch": 128, "scaling": "sqrt"},
        training={
            "batch_size": 4096 if stop else 128,
            "microbatch": 128,
            "stop": stop or {"epochs": 30},
        },
        schedule={"name": "step", "milestones": [{"share": 1 / 3}, {"share": 2 / 3}]},
    )


def test_regime_adaptation_keeps_the_updates() -> None:
    """Hoffer et al.: 128 to 4,096 with 7,680 updates and the rate times sqrt(32).

    Catches: milestones that are shares of the epochs where the run is bounded by
    updates; the linear rule in place of the square root.
    """
    small, large = hoffer(), hoffer(updates=7_680)
    rates = [round(0.1 * math.sqrt(32) * 0.1**k, 12) for k in range(3)]
    assert rates[0] == pytest.approx(0.565685, rel=1e-5)
    assert found(large) == [
        (0, 4096, rates[0]),
        (2_560, 4096, rates[1]),
        (5_120, 4096, rates[2]),
    ]
    assert [row[0] for row in found(small)] == [0, 2_560, 5_120]
    assert timeline(small)[-1].update == timeline(large)[-1].update == 7_680
    assert timeline(hoffer(epochs=30))[-1].update == 240


def test_warm_up_to_a_linearly_scaled_rate() -> None:
    """Goyal et al.: 256 to 8,192 examples, the rate rises from 0.1 to 3.2.

    Catches: a warm-up to the unscaled rate, or from the scaled one; lengths in updates.
    """
    warmup: JsonValue = {"length": {"epochs": 5}, "start": 1 / 32}
    spec = paper(
        1_281_167,
        optimizer={
            "learning_rate": 0.1,
            "reference_batch": 256,
            "scaling": "linear",
            "momentum": 0.9,
        },
        training={
            "batch_size": 8192,
            "microbatch": 32,
            "epoch_end": "drop",
            "stop": {"epochs": 90},
        },
        schedule={
            "name": "step",
            "milestones": [{"epochs": 30}, {"epochs": 60}, {"epochs": 80}],
            "warmup": warmup,
        },
    )
    rows = timeline(spec)
    assert [round(row.learning_rate, 10) for row in rows[:5]] == [
        0.1,
        3.2,
        0.32,
        0.032,
        0.0032,
    ]
    assert [row.update for row in rows] == [0, 780, 4_680, 9_360, 12_480, 14_040]
    assert rows[1].reason == "end of the warm-up"


def test_warm_up_over_a_share_of_the_run() -> None:
    """Masters and Luschi, 512 examples, 160 updates, from 1/32 of the rate over 5 %.

    Catches: a warm-up that ends one update early or late.
    """
    warmup: JsonValue = {"length": {"share": 0.05}, "start": 0.03125}
    spec = paper(
        4096,
        optimizer={
            "learning_rate": 2 / 512,
            "reference_batch": 1,
            "scaling": "linear",
        },
        training={"batch_size": 512, "stop": {"epochs": 20}},
        schedule={"warmup": warmup},
    )
    rates = [update.learning_rate for update in every_update(spec)]
    assert len(rates) == 160
    wanted = [0.0625, 0.3046875, 0.546875, 0.7890625, 1.03125]
    assert rates[:5] == pytest.approx(wanted, rel=1e-12)
    assert rates[7] < 2.0
    assert rates[8] == rates[-1] == 2.0


def test_batch_and_rate_cycle_alike() -> None:
    """Jastrzebski et al.: batch 64, 256 in turn, or the rate times 1, 1/4.

    Catches: a cycle that stops at its last entry; stages counted from one change on.
    """
    stop: JsonValue = {"epochs": 20}
    every: JsonValue = {"epochs": 5}
    batches = paper(
        20_480,
        training={"batch_size": 16, "stop": stop},
        batch_policy={
            "name": "table",
            "sizes": [64, 256],
            "every": every,
            "cyclic": True,
        },
    )
    rates = paper(
        20_480,
        training={"batch_size": 64, "stop": stop},
        schedule={"name": "cycle", "factors": [1.0, 0.25], "every": every},
    )
    assert [row[:2] for row in found(batches)] == [
        (0, 64),
        (1600, 256),
        (2000, 64),
        (3600, 256),
    ]
    assert [row[0] for row in found(rates)] == [0, 1600, 3200, 4800]
    assert [row[2] for row in found(rates)] == [0.1, 0.025, 0.1, 0.025]


def test_phases_change_settings_from_a_point_on() -> None:
    """Catches: a phase an update late, or whose settings undo those of another."""
    spec = run_spec(
        optimizer={"momentum": 0.9},
        training={"stop": {"updates": 30}},
        phases=[
            {"at": {"updates": 10}, "set": {"optimizer.momentum": 0.95}},
            {"at": {"share": 0.5}, "set": {"training.batch_size": 8}},
        ],
    )
    rows = timeline(spec)
    shown = [(r.update, r.batch_size, r.momentum, r.examples) for r in rows]
    assert shown == [
        (0, 16, 0.9, 0),
        (10, 16, 0.95, 160),
        (15, 8, 0.95, 240),
        (30, 8, 0.95, 360),
    ]
    assert rows[1].reason == "phase 1: optimizer.momentum = 0.95"


def random_spec(draw: random.Random) -> RunSpec:
    """Return a run of a hundred updates or so, with changes at odd places."""
    unit, scale = draw.choice([("updates", 100), ("epochs", 9.0), ("share", 0.9)])

    def point() -> dict[str, float]:
        value = draw.random() * scale
        return {unit: int(value) + 1 if unit == "updates" else value + 0.01}

    def points() -> list[dict[str, float]]:
        return sorted((point() for _ in range(2)), key=lambda item: item[unit])

    changes: dict[str, Any] = draw.choice([{"at": points()}, {"every": point()}])
    policy: dict[str, Any] = draw.choice(
        [
            {"name": "constant"},
            {"name": "growth", "factor": 1.7, "max": 60, **changes},
            {"name": "table", "sizes": [16, 7, 40], **changes},
        ]
    )
    schedule: dict[str, Any] = draw.choice(
        [
            {"name": "step", "milestones": points()},
            {"name": "step", "every": point(), "gamma": 0.9},
            {"name": "cycle", "factors": [1.0, 0.5, 0.1], "every": point()},
            {"name": "cosine"},
            {"name": "polynomial", "power": 2.0},
        ]
    )
    phases = draw.choice([[], [{"at": point(), "set": {"training.batch_size": 11}}]])
    stop = draw.choice([{"epochs": 10.0}, {"updates": 100}])
    return run_spec(
        training={
            "batch_size": 16,
            "epoch_end": draw.choice(["drop", "ragged", "run_on"]),
            "stop": stop,
        },
        optimizer={
            "reference_batch": 16,
            "scaling": draw.choice(["none", "linear", "sqrt"]),
            "follows": draw.choice(["present", "start"]),
        },
        schedule=schedule,
        batch_policy=policy,
        phases=phases,
    )


@pytest.mark.parametrize("seed", range(60))
def test_stretches_are_the_updates_one_by_one(seed: int) -> None:
    """On random runs: sizes, counts, and every rate that is not a smooth function.

    Catches: a stretch that goes on over a change; an epoch's end that is counted
    twice; an update lost between stretches.
    """
    spec = random_spec(random.Random(seed))
    single = every_update(spec)
    number = 0
    for stretch in stretches(spec):
        for like in single[number : number + stretch.count]:
            assert like.batch_size == stretch.first.batch_size
            assert like.base_rate == stretch.first.base_rate
            if not spec.schedule.smooth:
                assert like.learning_rate == stretch.first.learning_rate
        assert stretch.first == single[number]
        number += stretch.count
    assert number == len(single)
    assert number <= spec.max_updates
    end = timeline(spec)[-1]
    assert (end.update, end.examples) == (number, single[-1].after.examples)
    assert end.learning_rate == single[-1].learning_rate


def test_a_batch_that_does_not_fit_its_epoch_is_refused() -> None:
    """Catches: a timeline of a run that would fail in the middle."""
    policy = {"name": "growth", "factor": 2, "at": [{"updates": 3}], "max": 128}
    spec = run_spec(batch_policy={**policy, "factor": 8})
    with pytest.raises(UsageError, match="got one of 128 where 80 examples are left"):
        timeline(spec)


def test_a_smooth_rate_is_drawn_epoch_by_epoch() -> None:
    """Catches: a figure of a cosine that has two points."""
    spec = run_spec(schedule={"name": "cosine"}, training={"stop": {"updates": 40}})
    rows: list[Change] = timeline(spec, each_epoch=True)
    assert [row.epoch for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row.update for row in timeline(spec)] == [0, 40]
    last = 0.05 * (1 + math.cos(math.pi * 39 / 40))
    assert rows[-1].learning_rate == pytest.approx(last)
