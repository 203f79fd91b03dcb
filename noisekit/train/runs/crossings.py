"""Points that only the training loss decides: sustained crossings, and stalls.

Frozen states over the regular evaluations, which go into a checkpoint as JSON.
"""

import math
from dataclasses import dataclass
from typing import Literal

from noisekit.train.recipes.points import StalledSpec

Crossing = Literal["above", "candidate", "pending", "sustained", "passed"]


@dataclass(frozen=True, slots=True)
class LossCrossing:
    """The first sustained crossing of one training loss.

    The crossing is the first of ``sustain`` evaluations in a row at or below
    ``level``; its weights are kept from then on and dropped should the loss rise
    above again before the others have followed.

    Attributes:
        level: The training loss [loss].
        sustain: Evaluations in a row that make a crossing.
        below: Evaluations in a row so far.
        passed: Whether the crossing has been made.
    """

    level: float
    sustain: int
    below: int = 0
    passed: bool = False

    def after(self, train_loss: float) -> tuple["LossCrossing", Crossing]:
        """Return the state after one more evaluation, and what it means.

        ``candidate`` asks to keep the present weights, ``above`` to drop any kept,
        and ``sustained`` to take the snapshot from those kept. With ``sustain = 1``
        the present weights are kept and taken at once.
        """
        if self.passed:
            return self, "passed"
        if not train_loss <= self.level:
            return self._with(below=0), "above"
        below = self.below + 1
        if below >= self.sustain:
            return self._with(below=below, passed=True), "sustained"
        return self._with(below=below), "candidate" if below == 1 else "pending"

    def _with(self, *, below: int, passed: bool = False) -> "LossCrossing":
        return LossCrossing(self.level, self.sustain, below, passed)


@dataclass(frozen=True, slots=True)
class StallWatch:
    """Whether the training loss has stopped falling.

    Attributes:
        patience_epochs: Epochs without progress that are waited for.
        min_relative_decrease: Fall, relative to the best loss, that is progress.
        best: The loss that the last progress reached [loss].
        best_epoch: When that was.
        stalled: Whether patience has run out.
    """

    patience_epochs: float
    min_relative_decrease: float
    best: float = math.inf
    best_epoch: float = 0.0
    stalled: bool = False

    @classmethod
    def of(cls, spec: StalledSpec) -> "StallWatch":
        """Return the state before any evaluation."""
        return cls(spec.patience_epochs, spec.min_relative_decrease)

    def after(self, train_loss: float, *, epoch: float) -> "StallWatch":
        """Return the state after one more evaluation."""
        if self.stalled:
            return self
        progress = train_loss < self.best * (1.0 - self.min_relative_decrease)
        waited = epoch - self.best_epoch
        return StallWatch(
            self.patience_epochs,
            self.min_relative_decrease,
            best=train_loss if progress else self.best,
            best_epoch=epoch if progress else self.best_epoch,
            stalled=not progress and waited >= self.patience_epochs,
        )
