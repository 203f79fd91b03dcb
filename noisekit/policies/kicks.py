"""Kicks: a batch made small for a while where the loss has stalled."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from noisekit.core.errors import BatchSizeError
from noisekit.core.settings import PositiveInt, Settings, check_settings
from noisekit.policies.point import At, check_interval
from noisekit.policies.policy import Decision, Need, Observation, Policy, State

_TINY = 1e-12


class StallCriterion(ABC):
    """Whether a loss has stalled, by the means of its last intervals.

    Attributes:
        name: Name in recipes.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def num_losses(self) -> int:
        """How many losses it looks at; before there are so many it does not hold."""

    @abstractmethod
    def holds(self, losses: Sequence[float]) -> bool:
        """Whether the last :attr:`num_losses` have stalled; the oldest comes first."""


@dataclass(frozen=True, kw_only=True)
class RelativeDecrease(StallCriterion):
    r"""The loss fell by less than a share of itself over a window.

    .. math:: \frac{L_{t-k} - L_t}{L_{t-k}} < below

    Attributes:
        window: ``k`` intervals.
        below: The share; ``0`` waits until the loss has risen.
    """

    name = "relative_decrease"

    window: PositiveInt = 3
    below: float = 0.02

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(cast("Settings", self))

    @property
    def num_losses(self) -> int:
        """One more than the window."""
        return self.window + 1

    def holds(self, losses: Sequence[float]) -> bool:
        """Whether the decrease over the window is below the share."""
        before, now = losses[-1 - self.window], losses[-1]
        return (before - now) / max(before, _TINY) < self.below


@dataclass(frozen=True, kw_only=True)
class Progress(StallCriterion):
    r"""Prechelt's training progress over a strip of intervals is low.

    .. math:: P_k = 1000 \Big( \frac{\sum_{t} L_t}{k \min_t L_t} - 1 \Big) < below

    Attributes:
        window: ``k`` intervals of the strip.
        below: Threshold, in thousandths; Prechelt's is 0.1.

    Source:
        Prechelt 1998, "Early stopping - but when?".
    """

    name = "progress"

    window: PositiveInt = 5
    below: float = 0.1

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(cast("Settings", self))

    @property
    def num_losses(self) -> int:
        """The strip."""
        return self.window

    def holds(self, losses: Sequence[float]) -> bool:
        """Whether the strip's mean is little above its minimum."""
        strip = losses[-self.window :]
        mean, least = sum(strip) / len(strip), min(strip)
        return 1000 * (mean / max(least, _TINY) - 1) < self.below


@dataclass(frozen=True, kw_only=True)
class Kicks(Policy):
    """Make the batch small for a while where the training loss stalls.

    Losses of updates are averaged over intervals, weighted by their examples. Where the
    criterion holds at the end of one, the batch is ``small`` for ``length``; then the
    normal batch returns, nothing is decided for ``cooldown``, and losses of before the
    end of the kick do not count any more.

    This is a reconstruction: of Takase's paper only the abstract was at hand, which
    says that batch size is made small temporarily when the change of the training loss
    meets a stopping criterion. Criterion, sizes and lengths are ours.

    Attributes:
        batch_size: Examples per update outside kicks.
        small: Examples per update in a kick.
        length: Length of a kick.
        cooldown: Length of the pause after one.
        criterion: When the loss counts as stalled: :class:`RelativeDecrease`, or
            Prechelt's :class:`Progress`.
        every: Interval over which losses are averaged.
        patience: Intervals in a row at whose end the criterion has to hold.

    Raises:
        BatchSizeError: If ``small`` is not below ``batch_size``.

    Source:
        Reconstructed after Takase 2021, "Dynamic batch size tuning based on stopping
        criterion for neural network training".
    """

    name = "kicks"
    rule = (
        "m = small for length where the criterion says that the mean training loss has "
        "stalled, then the normal batch, and no kick during cooldown"
    )
    sources = (
        "a reconstruction after the abstract of Takase 2021, Dynamic batch size tuning "
        "based on stopping criterion for neural network training, Neurocomputing 429",
    )
    refuses = (
        "to be Takase's algorithm: criterion, sizes and lengths are a reconstruction",
    )

    batch_size: PositiveInt = 512
    small: PositiveInt = 32
    length: At = At(epochs=1)  # noqa: RUF009 - frozen
    cooldown: At = At(epochs=3)  # noqa: RUF009
    criterion: StallCriterion = RelativeDecrease()
    every: At = At(epochs=1)  # noqa: RUF009
    patience: PositiveInt = 1

    def __post_init__(self) -> None:
        """Check the settings and that kicks are small."""
        Policy.__post_init__(self)
        check_interval("length", self.length)
        check_interval("every", self.every)
        if self.small >= self.batch_size:
            raise BatchSizeError(
                f"small needs to be below the batch size {self.batch_size}, got "
                f"{self.small}."
            )

    @property
    def needs(self) -> tuple[Need, ...]:
        """The loss of every update."""
        return (Need("loss"),)

    def bounds(self) -> tuple[int, int]:
        """Return the batch sizes in a kick and outside."""
        return self.small, self.batch_size

    def start(self) -> State:
        """Return the normal mode, with no losses."""
        return {
            "mode": "normal",
            "since": None,
            "intervals": 0,
            "losses": [],
            "loss_sum": 0.0,
            "examples": 0,
            "streak": 0,
            "kicks": 0,
            "held": 0,
        }

    def next(self, state: State, observation: Observation) -> tuple[State, Decision]:
        """Add the last update's loss, end an interval, begin or end a kick."""
        new = dict(state)
        if observation.updates > 0:
            self._add_loss(new, observation)
        intervals = self.every.count(observation)
        if intervals > new["intervals"]:
            new["intervals"] = intervals
            self._end_interval(new, observation)
        if new["mode"] == "kick" and self._passed(self.length, new, observation):
            new |= {"mode": "cooldown", "since": self.cooldown.now(observation)}
            new |= {"losses": [], "loss_sum": 0.0, "examples": 0, "streak": 0}
        if new["mode"] == "cooldown" and self._passed(self.cooldown, new, observation):
            new |= {"mode": "normal", "since": None}
        size = self.small if new["mode"] == "kick" else self.batch_size
        return new, Decision(size, reason=f"{new['mode']}, {new['kicks']} kicks so far")

    def _passed(
        self, length: At, state: Mapping[str, Any], observation: Observation
    ) -> bool:
        return length.passed_since(state["since"], observation)

    def _add_loss(self, new: dict[str, Any], observation: Observation) -> None:
        loss, size = observation.loss, observation.batch_size
        if loss is None or not size or not math.isfinite(loss):
            new["held"] += 1
            return
        new["loss_sum"] += loss * size
        new["examples"] += size

    def _end_interval(self, new: dict[str, Any], observation: Observation) -> None:
        """Append the interval's mean loss, and begin a kick if it has stalled."""
        if not new["examples"]:
            return  # no loss was seen in it
        mean = new["loss_sum"] / new["examples"]
        kept = [*new["losses"], mean][-self.criterion.num_losses :]
        new |= {"losses": kept, "loss_sum": 0.0, "examples": 0}
        if new["mode"] != "normal":
            return
        enough = len(kept) >= self.criterion.num_losses
        stalled = enough and self.criterion.holds(kept)
        new["streak"] = new["streak"] + 1 if stalled else 0
        if new["streak"] >= self.patience:
            new |= {"mode": "kick", "kicks": new["kicks"] + 1, "streak": 0}
            new["since"] = self.length.now(observation)
