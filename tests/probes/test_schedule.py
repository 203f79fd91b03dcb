"""When a probe reads, by a clock that the test moves."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.integrations import attach
from noisekit.probes.schedule import (
    DeviceClock,
    HostClock,
    Mark,
    Schedule,
    StepTimer,
    clock_of,
)


class Seconds:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(
    schedule: Schedule,
    seconds: Seconds,
    *,
    steps: range,
    plain: Callable[[int], float],
    cost: Callable[[int], float],
) -> list[int]:
    """Train for ``steps`` and return those that were read."""
    read = []
    for step in steps:
        due = schedule.is_due(step)
        seconds.now += plain(step) + (cost(step) if due else 0.0)
        schedule.step_ended(read=due)
        if due:
            read.append(step)
    return read


def by_budget(budget: float) -> tuple[Schedule, Seconds]:
    seconds = Seconds()
    return Schedule(1, budget, HostClock(seconds)), seconds


@pytest.mark.parametrize(("budget", "every"), [(0.03, 14), (0.1, 4), (0.5, 1)])
def test_interval_follows_from_cost_and_budget(budget: float, every: int) -> None:
    """A reading that adds 40 % to its step, in steps of 10 ms.

    Catches: the budget taken of the read steps; an interval rounded down; a cost that
    has the step itself in it.
    """
    schedule, seconds = by_budget(budget)
    read = run(
        schedule,
        seconds,
        steps=range(1, 2001),
        plain=lambda s: 0.01,
        cost=lambda s: 0.004,
    )
    overhead = schedule.overhead()
    assert overhead.share.value <= budget
    assert overhead.every == max(1, every)
    assert overhead.cost.value == pytest.approx(0.004)
    assert overhead.step_time.value == pytest.approx(0.01)
    gaps = {b - a for a, b in zip(read[-20:-1], read[-19:], strict=True)}
    assert gaps <= {every - 1, every, every + 1}
    if budget < 0.4:
        assert overhead.share.value == pytest.approx(budget, rel=0.1)


def test_readings_cheaper_than_the_budget_are_taken_at_every_step() -> None:
    """Catches: steps left out for no reason, as at a cost measured below zero."""
    schedule, seconds = by_budget(0.03)
    read = run(
        schedule,
        seconds,
        steps=range(1, 101),
        plain=lambda s: 0.01,
        cost=lambda s: -1e-5,
    )
    assert read == [1, *range(5, 101)]


def test_budget_holds_although_the_first_readings_cost_more() -> None:
    """Catches: an interval that forgets what was spent before it was known.

    The first two readings carry the closure check, and cost ten times as much.
    """
    schedule, seconds = by_budget(0.03)
    spent = []

    def cost(step: int) -> float:
        spent.append(0.04 if len(spent) < 2 else 0.004)
        return spent[-1]

    run(schedule, seconds, steps=range(1, 3001), plain=lambda s: 0.01, cost=cost)
    assert sum(spent) <= 0.03 * 3000 * 0.01 * (1 + 1e-9)  # as floats add up
    assert len(spent) > 50


def test_interval_follows_a_changed_pace() -> None:
    """Steps become ten times longer, as with a larger batch size.

    Catches: a median over the whole run.
    """
    schedule, seconds = by_budget(0.03)
    run(
        schedule,
        seconds,
        steps=range(1, 501),
        plain=lambda s: 0.01,
        cost=lambda s: 0.004,
    )
    run(
        schedule,
        seconds,
        steps=range(501, 1001),
        plain=lambda s: 0.1,
        cost=lambda s: 0.004,
    )
    assert schedule.overhead().every == 2


def test_evaluations_between_steps_do_not_count() -> None:
    """Every twentieth step an evaluation takes a second.

    Catches: means of durations; an evaluation booked as the cost of a reading.
    """
    schedule, seconds = by_budget(0.03)
    read = run(
        schedule,
        seconds,
        steps=range(1, 2001),
        plain=lambda s: 1.0 if s % 20 == 0 else 0.01,
        cost=lambda s: 0.004,
    )
    overhead = schedule.overhead()
    assert overhead.step_time.value == pytest.approx(0.01)
    assert overhead.every == pytest.approx(14, abs=1)
    assert len(read) > 90  # 150 of steps without evaluations


def test_clocks_that_tell_late_are_not_waited_for() -> None:
    """Durations that are not known yet, as of a device that runs behind.

    Catches: a step timed by a mark that has not passed.
    """

    class Late(HostClock):
        known = False

        def seconds(self, start: Mark, end: Mark) -> float | None:
            return super().seconds(start, end) if self.known else None

    seconds = Seconds()
    clock = Late(seconds)
    schedule = Schedule(1, 0.03, clock)
    options = {"plain": lambda s: 0.01, "cost": lambda s: 0.004}
    read = run(schedule, seconds, steps=range(1, 21), **options)
    assert read == [1]
    assert schedule.overhead().share.status is Status.UNAVAILABLE
    clock.known = True
    read = run(schedule, seconds, steps=range(21, 221), **options)
    assert read[0] == 22
    assert schedule.overhead().share.value <= 0.03


def test_cost_has_an_error() -> None:
    """Catches: a median without its spread."""
    seconds = Seconds()
    timer = StepTimer(HostClock(seconds))
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        noise = 1e-3 * float(torch.randn((), generator=generator))
        seconds.now += 0.01 + noise + (0.004 if step % 2 else 0.0)
        timer.step_ended(read=bool(step % 2))
    cost = timer.cost()
    assert cost.error_source is ErrorSource.STEPS
    assert cost.stderr is not None
    assert 1e-4 < cost.stderr < 1e-3
    assert abs(cost.value - 0.004) < 4 * cost.stderr


def test_every_and_functions_have_an_overhead_too() -> None:
    """Catches: a cost that is known with a budget only."""
    for every in (4, lambda step: step % 4 == 1):
        seconds = Seconds()
        schedule = Schedule(every, None, HostClock(seconds))
        read = run(
            schedule,
            seconds,
            steps=range(1, 101),
            plain=lambda s: 0.01,
            cost=lambda s: 0.004,
        )
        assert read == list(range(1, 101, 4))
        overhead = schedule.overhead()
        assert overhead.every == 4
        assert overhead.share.value == pytest.approx(0.1)
        assert overhead.budget is None


def test_overhead_says_it_in_one_line() -> None:
    """Catches: a share without the interval, the budget and the clock."""
    schedule, seconds = by_budget(0.03)
    assert str(schedule.overhead()) == (
        "cost of readings not known: needs steps with and without a reading"
    )
    run(
        schedule,
        seconds,
        steps=range(1, 1001),
        plain=lambda s: 0.01,
        cost=lambda s: 0.004,
    )
    assert str(schedule.overhead()) == (
        "readings every 14 steps took 3 % of the time (3 % allowed): 4 ms beside steps "
        "of 10 ms, by wall clock"
    )


def test_devices_are_timed_by_their_own_events() -> None:
    """Catches: the host's clock around kernels that run later."""
    assert isinstance(clock_of(torch.device("cuda", 0)), DeviceClock)
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert isinstance(clock_of(torch.device("meta")), HostClock)


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_probe_reports_its_overhead() -> None:
    """Real steps and a real clock; only what must hold is asked.

    Catches: steps that are not timed, or all taken for steps with a reading.
    """
    model, optimizer = model_and_optimizer()
    probe = attach(model, optimizer, every=2)
    assert probe.overhead.share.status is Status.UNAVAILABLE
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    assert probe.overhead.share.status is Status.OK
    assert probe.overhead.every == 2
    assert probe.overhead.cost.num_samples == 3
    assert probe.overhead.step_time.num_samples == 4


BUDGETS = [
    ({"budget": 0.0}, "budget needs to be between 0 and 1, got 0"),
    (
        {"budget": 0.03, "every": 2},
        r"budget=0\.03 and every=2 both say which steps are read; give one of them\.",
    ),
    (
        {"budget": 0.03, "repeatable": True},
        "got a run where repeatable=True promises the same steps on a second run; use",
    ),
]


@pytest.mark.parametrize(("options", "message"), BUDGETS, ids=["share", "both", "flag"])
def test_budgets_that_do_not_fit_are_refused(
    options: dict[str, object], message: str
) -> None:
    """Catches: a clock that decides what a policy sees."""
    with pytest.raises(UsageError, match=message):
        attach(*model_and_optimizer(), **options)  # type: ignore[arg-type]


def test_deterministic_runs_refuse_a_budget() -> None:
    """Catches: bits that are promised, and steps read that depend on the machine."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UsageError, match="promise that a second run is the same"):
            attach(*model_and_optimizer(), budget=0.03)
    finally:
        torch.use_deterministic_algorithms(False)
