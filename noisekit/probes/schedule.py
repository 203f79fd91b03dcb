"""When a probe reads, and what its readings cost."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from noisekit.core.arguments import call_given
from noisekit.core.results import ErrorSource, Estimate, Status

_NUM_PLAIN, _NUM_READ = 32, 8
"""Latest steps whose durations count: training changes its pace."""
_OUTLIER = 4.0
"""Times the usual cost: what a step took beyond that, it did for something else."""
_FIRST_PLAIN = 3
"""Steps without a reading that are timed before the second reading."""

Mark = float | torch.cuda.Event


class Clock(Protocol):
    """Marks ends of steps, and tells how far apart two of them are."""

    @property
    def name(self) -> str:
        """What is measured with."""

    def mark(self) -> Mark:
        """Return the present, without waiting for anything."""

    def seconds(self, start: Mark, end: Mark) -> float | None:
        """Return the time between two marks; ``None`` while it is not known yet."""


class HostClock:
    """The wall clock; ``now`` returns seconds."""

    name = "wall clock"

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def mark(self) -> Mark:
        """Return the present."""
        return self._now()

    def seconds(self, start: Mark, end: Mark) -> float | None:
        """Return the difference."""
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start


class DeviceClock:
    """CUDA events in the training's own stream, asked only once they have passed."""

    name = "CUDA events"

    def mark(self) -> Mark:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float | None:
        """Return the time between two events, if the device has come to the later."""
        assert not isinstance(start, float)
        assert not isinstance(end, float)
        passed = end.query()  # type: ignore[no-untyped-call]
        return start.elapsed_time(end) / 1000 if passed else None


def clock_of(device: torch.device) -> Clock:
    """Return what steps on ``device`` are timed with."""
    return DeviceClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True, slots=True)
class Overhead:
    """What the readings of a probe have cost.

    Attributes:
        share: Time spent on readings, relative to that of the steps without them.
        cost: Median time that a reading adds to its step [s].
        step_time: Median time of a step without a reading [s].
        every: Steps from one reading to the next at present.
        budget: The share that was asked for; ``None`` without one.
        clock: What was measured with.
    """

    share: Estimate
    cost: Estimate
    step_time: Estimate
    every: float
    budget: float | None
    clock: str

    def __str__(self) -> str:
        """Say it in one line."""
        if self.share.status is not Status.OK:
            return "cost of readings not known: needs steps with and without a reading"
        wanted = "" if self.budget is None else f" ({100 * self.budget:.3g} % allowed)"
        return (
            f"readings every {self.every:.3g} steps took {100 * self.share.value:.2g} "
            f"% of the time{wanted}: {1000 * self.cost.value:.3g} ms beside steps of "
            f"{1000 * self.step_time.value:.3g} ms, by {self.clock}"
        )


class StepTimer:
    """Compares the durations of steps with a reading to those of steps without.

    That counts whatever a reading slows down, also where kernels run behind the
    program's back. Medians keep an evaluation between two steps from counting.
    """

    def __init__(self, clock: Clock) -> None:
        self.num_steps = 0
        self.num_readings = 0
        self._clock = clock
        self._last: Mark | None = None
        self._open: deque[tuple[Mark, Mark, bool]] = deque(maxlen=_NUM_PLAIN)
        self._plain: deque[float] = deque(maxlen=_NUM_PLAIN)
        self._read: deque[float] = deque(maxlen=_NUM_READ)
        self._spent = 0.0
        self._num_spent = 0

    def step_ended(self, *, read: bool) -> None:
        """Note the end of a step, and whether it had a reading.

        The first is not timed: where it began is not known, and much happens once.
        """
        now = self._clock.mark()
        if self._last is not None:
            self._open.append((self._last, now, read))
        self._last = now
        self.num_steps += 1
        self.num_readings += read
        while self._open:
            start, end, was_read = self._open[0]
            seconds = self._clock.seconds(start, end)
            if seconds is None:
                break
            (self._read if was_read else self._plain).append(seconds)
            self._open.popleft()
            if was_read and self._plain:
                self._spend(seconds)

    def _spend(self, seconds: float) -> None:
        """Count what a reading has added; the first, not timed, is like the second."""
        usual = max(self.cost().value, 0.0)
        added = max(seconds - self.step_time().value, 0.0)
        times = 2 if self._num_spent == 0 else 1
        self._spent += times * min(added, _OUTLIER * usual)
        self._num_spent += times

    def spent(self) -> float:
        """Return the time that all readings so far have taken [s]."""
        missing = self.num_readings - self._num_spent
        return self._spent + missing * max(self.cost().value, 0.0)

    def step_time(self) -> Estimate:
        """Return the median time of a step without a reading [s]."""
        return _median(self._plain)

    def cost(self) -> Estimate:
        """Return the median time that a reading adds to its step [s].

        Of an even number the lower: an evaluation in one of two must not decide.
        """
        plain, read = _median(self._plain), _median(self._read, low=True)
        if Status.UNAVAILABLE in (plain.status, read.status):
            return Estimate(math.nan, status=Status.UNAVAILABLE)
        return Estimate(
            read.value - plain.value,
            stderr=math.hypot(plain.stderr or 0.0, read.stderr or 0.0),
            error_source=ErrorSource.STEPS,
            num_samples=read.num_samples,
        )

    def overhead(self, *, every: float, budget: float | None) -> Overhead:
        """Return what the readings so far have cost."""
        cost, step_time = self.cost(), self.step_time()
        share = Estimate(math.nan, status=Status.UNAVAILABLE)
        if cost.status is Status.OK:
            whole = self.num_steps * step_time.value
            share = Estimate(
                self.spent() / whole,
                stderr=(cost.stderr or 0.0) * self.num_readings / whole,
                error_source=ErrorSource.STEPS,
                num_samples=cost.num_samples,
            )
        return Overhead(share, cost, step_time, every, budget, self._clock.name)


class Schedule:
    """Decides which steps are read: each k-th, those a function names, or by budget.

    With a budget, a step is read once the time of all steps so far can pay for one
    more reading, so that the share stays below it whatever the first ones cost. What
    a reading costs is known from the second one on, after a few steps without.
    """

    def __init__(
        self, every: int | Callable[[int], bool], budget: float | None, clock: Clock
    ) -> None:
        self._every = every
        self._budget = budget
        self._timer = StepTimer(clock)

    def is_due(self, step: int) -> bool:
        """Whether this step, counted from one, is to be read."""
        if self._budget is not None:
            return self._is_paid(self._budget)
        every = self._every
        if not callable(every):
            return (step - 1) % every == 0
        return bool(call_given("every", every, step, takes="a step's number"))

    def _is_paid(self, budget: float) -> bool:
        timer = self._timer
        if timer.num_readings == 0:
            return True
        step_time, cost = timer.step_time(), timer.cost()
        if cost.status is not Status.OK:
            enough = (step_time.num_samples or 0) >= _FIRST_PLAIN
            return enough and timer.num_readings == 1
        allowed = budget * (timer.num_steps + 1) * step_time.value
        return timer.spent() + cost.value <= allowed

    def step_ended(self, *, read: bool) -> None:
        """Note the end of a step, and whether it had a reading."""
        self._timer.step_ended(read=read)

    def overhead(self) -> Overhead:
        """Return what the readings so far have cost."""
        return self._timer.overhead(every=self._interval(), budget=self._budget)

    def _interval(self) -> float:
        timer, every = self._timer, self._every
        if self._budget is None:
            if not callable(every):
                return float(every)
            taken = timer.num_readings
            return timer.num_steps / taken if taken else math.nan
        cost, step_time = timer.cost(), timer.step_time()
        if cost.status is not Status.OK:
            return math.nan
        return float(max(1, math.ceil(cost.value / (self._budget * step_time.value))))


def _median(durations: Sequence[float], *, low: bool = False) -> Estimate:
    """The error is that of a median of normal values with the spread of the middle."""
    if not durations:
        return Estimate(math.nan, status=Status.UNAVAILABLE)
    median = (statistics.median_low if low else statistics.median)(durations)
    spread = 1.4826 * statistics.median(abs(d - median) for d in durations)
    return Estimate(
        median,
        stderr=math.sqrt(math.pi / 2) * spread / math.sqrt(len(durations)),
        error_source=ErrorSource.STEPS,
        num_samples=len(durations),
    )
