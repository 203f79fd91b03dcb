"""What policies that follow readings share: bounds, missing values, hysteresis."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Lt

from noisekit.core.errors import BatchSizeError
from noisekit.core.settings import Hint, NonNegative
from noisekit.policies.point import At, check_interval
from noisekit.policies.policy import Decision, Observation, Policy, State

TwoOrMore = Annotated[
    int, Ge(2), Hint("since one example has no variance, and the rule would be stuck")
]
Smoothing = Annotated[
    float, Ge(0), Lt(1), Hint(advice="0 follows every reading, 0.95 about the last 20")
]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a rule asks for after a reading.

    Attributes:
        size: The batch size before rounding and bounds; ``None`` to keep the last one.
        reason: The numbers behind it, or why there is none.
        memory: What the rule keeps for the next reading.
    """

    size: float | None
    reason: str
    memory: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Adaptive(Policy):
    """Base of policies that follow readings.

    Before the first reading the batch size is the first one. A reading that is missing
    or not finite is left out of averages; that and a reading from which the rule can
    name no size keep the last size, and are counted in the state's ``held``. Sizes are
    rounded half to even, then clipped to ``[min, max]``.

    Attributes:
        batch_size: Examples of the first update; ``min`` by default.
        min: Smallest batch size.
        max: Largest batch size.
        hysteresis: A change smaller than this share of the present size is not made.

    Raises:
        BatchSizeError: If ``batch_size`` is not within ``[min, max]``.
    """

    batch_size: int | None = None
    min: TwoOrMore = 16
    max: TwoOrMore = 2048
    hysteresis: NonNegative = 0.0

    def __post_init__(self) -> None:
        """Check the settings and their order."""
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", self.min)
        Policy.__post_init__(self)
        if not self.min <= self.first_size <= self.max:
            raise BatchSizeError(
                f"batch_size needs to be within [min, max] = [{self.min}, {self.max}], "
                f"got {self.batch_size}."
            )

    @property
    def first_size(self) -> int:
        """Examples of the first update."""
        return self.min if self.batch_size is None else self.batch_size

    def bounds(self) -> tuple[int, int]:
        """Return ``min`` and ``max``."""
        return self.min, self.max

    @abstractmethod
    def memory(self) -> Mapping[str, Any]:
        """Return what the rule keeps, before the first reading."""

    @abstractmethod
    def wanted(self, memory: State, observation: Observation) -> Wanted:
        """Apply the rule to a complete reading.

        Args:
            memory: What it has kept so far; not to be changed.
            observation: All that ``needs`` names is there and finite.
        """

    def start(self) -> State:
        """Return the first size, no reading held, and the rule's memory."""
        return {"batch_size": self.first_size, "held": 0, **self.memory()}

    def next(self, state: State, observation: Observation) -> tuple[State, Decision]:
        """Apply the rule to the last update's reading, if there is one."""
        size: int = state["batch_size"]
        if observation.updates == 0:
            return state, self.decision(state, "no update yet")
        if not self.is_due(state, observation):
            return state, self.decision(state, "between two decisions")
        missing = self._missing(observation)
        if missing:
            return self.held(state, f"no finite {missing}")
        found = self.wanted(state, observation)
        if found.size is None or math.isnan(found.size):
            return self.held({**state, **found.memory}, found.reason)
        asked = self._clipped(found.size)
        reason = found.reason
        if abs(asked - size) < self.hysteresis * size:
            reason = f"{reason}: within {self.hysteresis:g} of {size}"
            asked = size
        new = {**state, **found.memory, "batch_size": asked}
        return new, self.decision(new, reason)

    def is_due(self, state: State, observation: Observation) -> bool:
        """Whether a reading is wanted here; after every update, unless overridden."""
        return True

    def decision(self, state: State, reason: str) -> Decision:
        """Return the decision that a state stands for."""
        return Decision(state["batch_size"], reason=reason)

    def held(self, state: State, reason: str) -> tuple[State, Decision]:
        """Keep the size, and count that."""
        new = {**state, "held": state["held"] + 1}
        return new, self.decision(new, f"held: {reason}")

    def _missing(self, observation: Observation) -> str:
        """The first value that is needed and not there, or not finite."""
        names = ("batch_size", *(need.name for need in self.needs))
        for name in names:
            value = observation.value(name)
            if value is None or not math.isfinite(value):
                return name
        return ""

    def _clipped(self, size: float) -> int:
        if math.isinf(size):
            return self.max if size > 0 else self.min
        return min(max(round(size), self.min), self.max)


@dataclass(frozen=True, kw_only=True)
class AtIntervals(Adaptive):
    """Base of policies that decide now and then.

    The first reading is used, then the first one after each interval.

    Attributes:
        every: The interval.
    """

    every: At = At(updates=1)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        """Check the interval too."""
        Adaptive.__post_init__(self)
        check_interval("every", self.every)

    def start(self) -> State:
        """Return the state, with no decision taken yet."""
        return {**Adaptive.start(self), "decided_at": None}

    def is_due(self, state: State, observation: Observation) -> bool:
        """Whether the interval since the last reading has passed."""
        then = state["decided_at"]
        return then is None or self.every.passed_since(then, observation)

    def next(self, state: State, observation: Observation) -> tuple[State, Decision]:
        """Apply the rule where it is due, and note when that was."""
        due = observation.updates > 0 and self.is_due(state, observation)
        new, decision = Adaptive.next(self, state, observation)
        if due and not self._missing(observation):
            new = {**new, "decided_at": self.every.now(observation)}
        return new, decision


def averaged(average: float, value: float, smoothing: float) -> float:
    """Return the exponential average after one more value, without bias correction."""
    return smoothing * average + (1 - smoothing) * value
