"""Losses of recipes: one table, used wherever a run needs a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from noisekit.core.errors import UsageError
from noisekit.core.risk import LossFn
from noisekit.train.references import resolve

PerExample = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, and what counts as an error under it.

    Attributes:
        mean: Mean over the examples of a batch [loss]; what gradients are taken of.
        per_example: Loss of each example; its sum over all data is evaluated.
        wrong: Error of each example, as 0 or 1 in classification.
    """

    mean: LossFn
    per_example: PerExample
    wrong: PerExample


def misclassified(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each example whether the largest output is not the target's."""
    return outputs.argmax(1) != targets


def _each_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross_entropy": Loss(
            mean=cross_entropy,
            per_example=_each_cross_entropy,
            wrong=misclassified,
        ),
    }
)
"""Losses by name. A recipe may also name its own, ``module:function``."""


def find_loss(name: str) -> Loss:
    """Return the loss that ``training.loss`` names.

    The user's own is a :class:`Loss`, or a function of outputs and targets that
    returns each example's loss; its error is the misclassification rate.

    Raises:
        UsageError: If it is neither.
    """
    if name in LOSSES:
        return LOSSES[name]
    found = resolve(name)
    if isinstance(found, Loss):
        return found
    if not callable(found):
        raise UsageError(
            f"training.loss needs a Loss or a function of outputs and targets, got "
            f"{type(found).__name__} at {name!r}."
        )
    per_example = cast("PerExample", found)

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = per_example(outputs, targets)
        if losses.shape != targets.shape[:1]:
            raise UsageError(
                f"training.loss {name!r} needs to return one loss per example, shape "
                f"{tuple(targets.shape[:1])}, got {tuple(losses.shape)}."
            )
        return torch.mean(losses)

    return Loss(mean=mean, per_example=per_example, wrong=misclassified)
