"""The update rule of SGD, in PyTorch's convention."""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt

from noisekit.core.errors import UsageError
from noisekit.core.settings import NonNegative, Positive, check_settings

Momentum = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SGDRule:
    """The update rule of ``torch.optim.SGD``.

    ``v = momentum v + (1 - dampening) g``; the step is ``lr v``, or
    ``lr (g + momentum v)`` by Nesterov. ``g`` includes ``weight_decay w``.

    Attributes:
        lr: Learning rate.
        momentum: Share of the velocity that is kept.
        dampening: What the gradient's part in the velocity lacks.
        nesterov: Whether the step looks ahead.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr: Positive
    momentum: Momentum = 0.0
    dampening: Momentum = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def __post_init__(self) -> None:
        """Refuse what PyTorch refuses, and what is never stable."""
        check_settings(self)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise UsageError(
                "nesterov needs momentum above 0 and no dampening, got "
                f"{self.momentum} and {self.dampening}."
            )

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "SGDRule":
        """Return the rule of an optimizer.

        Raises:
            UsageError: If it is not SGD, maximizes, or its groups have different rules.
        """
        if not isinstance(optimizer, torch.optim.SGD):
            raise UsageError(
                "stability thresholds are known for torch.optim.SGD, got "
                f"{type(optimizer).__name__}, whose steps depend on the history of "
                "every weight."
            )
        rules = {cls._of_group(group) for group in optimizer.param_groups}
        if len(rules) > 1:
            raise UsageError(
                f"one threshold needs one update rule, got {len(rules)} different "
                "parameter groups; ask for each with SGDRule(lr=..., ...)."
            )
        if any(group["maximize"] for group in optimizer.param_groups):
            raise UsageError(
                "a threshold needs a loss that is minimized, got maximize."
            )
        return rules.pop()

    @classmethod
    def _of_group(cls, group: dict[str, float]) -> "SGDRule":
        names = ("lr", "momentum", "dampening", "weight_decay")
        values = {name: float(group[name]) for name in names}
        # Without momentum PyTorch ignores dampening.
        damped = values["dampening"] if values["momentum"] else 0.0
        return cls(
            lr=values["lr"],
            momentum=values["momentum"],
            dampening=damped,
            nesterov=bool(group["nesterov"]),
            weight_decay=values["weight_decay"],
        )


def check_steps_of_mean(reduction: str) -> None:
    """Check that an optimizer's own rate acts on the mean over a batch.

    Args:
        reduction: Of the loss; curvatures are those of its mean over examples.

    Raises:
        UsageError: If it is ``"sum"``.
    """
    if reduction == "sum":
        raise UsageError(
            "a stability threshold in units of the mean loss needs the rate of its "
            "steps, got a sum loss, whose steps grow with the batch; pass "
            "SGDRule(lr=rate * n, weight_decay=decay / n), n the examples of a step, "
            "to measure or edge_of_stability_ratio; a tracker goes without optimizer=."
        )
