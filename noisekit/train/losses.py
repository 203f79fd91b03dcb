"""Losses of recipes: one table, used wherever a run needs a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    one_hot,
)

from noisekit.core.errors import UsageError
from noisekit.core.references import resolve
from noisekit.core.risk import LossFn

PerExample = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, and what counts as an error under it.

    Outputs have the classes on axis 1: ``(n, classes)``, or ``(n, classes,
    positions)`` where each position of a sequence has a target. The loss of such an
    example is the mean over its positions, and its error the share of positions at
    which it is wrong.

    Attributes:
        mean: Mean over the examples of a batch [loss]; what gradients are taken of.
        per_example: Loss of each example, ``(n,)``; its sum over all data is evaluated.
        wrong: Error of each example, ``(n,)``: 0 or 1 where it has one target.
    """

    mean: LossFn
    per_example: PerExample
    wrong: PerExample


def misclassified(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each example whether the largest output is not the target's.

    A single output is the logit of class 1. With a target per position it is the share
    of positions.
    """
    alone = outputs.shape[1] == 1
    chosen = (outputs[:, 0] > 0).long() if alone else outputs.argmax(1)
    wrong = chosen != targets
    return wrong if wrong.dim() == 1 else wrong.flatten(1).float().mean(1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``|f(x) - e_y|²`` per example, summed over classes, without a half."""
    return _each((outputs - _indicators(outputs, targets)).square().sum(1))


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return half of the squared error of each example."""
    return squared_error(outputs, targets) / 2


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy per example, summed over outputs.

    One output is the logit of class 1. Several are logits of one class against the
    others each.
    """
    if outputs.shape[1] == 1:
        wanted = targets.unsqueeze(1).to(outputs.dtype)
    else:
        wanted = _indicators(outputs, targets)
    losses = binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
    return _each(losses.sum(1))


def _each_cross_entropy(
    outputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    return _each(
        cross_entropy(
            outputs, targets, reduction="none", label_smoothing=label_smoothing
        )
    )


def _each(losses: Tensor) -> Tensor:
    """Average over positions, where there are any."""
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


def _indicators(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 for the target's class and 0 for the others, in the outputs' shape."""
    classes = one_hot(targets, outputs.shape[1])  # (n, ..., classes)
    return classes.movedim(-1, 1).to(outputs.dtype)


def _mean_of(per_example: PerExample) -> LossFn:
    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return per_example(outputs, targets).mean()

    return mean


def _of_classes(per_example: PerExample) -> Loss:
    return Loss(_mean_of(per_example), per_example, misclassified)


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        # PyTorch's own, which the curvature operators know.
        "cross_entropy": Loss(cross_entropy, _each_cross_entropy, misclassified),
        "squared_error": _of_classes(squared_error),
        "half_squared_error": _of_classes(half_squared_error),
        "binary_cross_entropy": _of_classes(binary_cross_entropy),
    }
)
"""Losses by name. A recipe may also name its own, ``module:function``."""


def find_loss(name: str, *, label_smoothing: float = 0.0) -> Loss:
    """Return the loss that ``training.loss`` names.

    The user's own is a :class:`Loss`, or a function of outputs and targets that
    returns each example's loss; its error is the misclassification rate.

    Args:
        name: One of the table, or ``module:function``.
        label_smoothing: Share of the target that all classes have evenly; only with
            cross-entropy.

    Raises:
        UsageError: If it is neither.
    """
    if label_smoothing:
        return Loss(
            partial(cross_entropy, label_smoothing=label_smoothing),
            partial(_each_cross_entropy, label_smoothing=label_smoothing),
            misclassified,
        )
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
