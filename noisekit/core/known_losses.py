"""Losses that are known: PyTorch's, what each divides by, and a model's own."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.batches import tensors_in
from noisekit.core.errors import LossShapeError


@dataclass(frozen=True, slots=True)
class KnownLoss:
    r"""What is known of a loss.

    A mean over classes divides by :math:`\sum_i w_{y_i}` over the targets ``y_i`` that
    are not ignored; one over elements by their number.

    Attributes:
        kind: What its targets are: classes, or values of the outputs' shape.
        likelihood: Whose negative logarithm it is, in the model's outputs.
        weight: Weights of the classes; ``None`` for 1 each.
        ignore_index: The class that does not count.
    """

    kind: Literal["classes", "elements"]
    likelihood: Literal["categorical", "gaussian"] | None = None
    weight: Tensor | None = None
    ignore_index: int = -100

    def divisor(self, targets: Any) -> Tensor | float:
        """Return what the mean over a batch's targets divides by."""
        if self.kind == "elements":
            return float(targets.numel())
        if targets.is_floating_point():  # class probabilities: weights do not divide
            return float(targets.numel() / targets.shape[min(1, targets.ndim - 1)])
        weights = self.target_weights(targets)
        assert weights is not None
        # A sum of many ones is exact in double precision only.
        return weights.sum(dtype=torch.float64)

    def target_weights(self, targets: Any) -> Tensor | None:
        """Return the weight of each class target; ``None`` where they are not classes.

        The class weight of a target that is not ignored, zero of one that is.
        """
        if self.kind != "classes" or not isinstance(targets, Tensor):
            return None
        if targets.is_floating_point():
            return None
        counted = targets != self.ignore_index
        if self.weight is None:
            return counted.to(torch.float32)
        weights = self.weight.to(targets.device)[targets.where(counted, 0)]
        return weights * counted


_LOSSES: tuple[tuple[type[nn.Module], object, KnownLoss], ...] = (
    (
        nn.CrossEntropyLoss,
        functional.cross_entropy,
        KnownLoss("classes", "categorical"),
    ),
    (nn.NLLLoss, functional.nll_loss, KnownLoss("classes")),
    (nn.MSELoss, functional.mse_loss, KnownLoss("elements", "gaussian")),
    (nn.L1Loss, functional.l1_loss, KnownLoss("elements")),
    (nn.SmoothL1Loss, functional.smooth_l1_loss, KnownLoss("elements")),
    (nn.HuberLoss, functional.huber_loss, KnownLoss("elements")),
    (nn.BCELoss, functional.binary_cross_entropy, KnownLoss("elements")),
    (
        nn.BCEWithLogitsLoss,
        functional.binary_cross_entropy_with_logits,
        KnownLoss("elements"),
    ),
)


def known_loss(loss_fn: object) -> KnownLoss | None:
    """Return what is known of a loss of PyTorch; ``None`` for other losses.

    A module, a function, or a ``functools.partial`` of a function with keywords. A
    subclass with a ``forward`` of its own is another loss.
    """
    if isinstance(loss_fn, partial):
        inner = None if loss_fn.args else known_loss(loss_fn.func)
        return None if inner is None else _with_options(inner, loss_fn.keywords)
    for kind, function, known in _LOSSES:
        if loss_fn is function:
            return known
        if (
            isinstance(loss_fn, kind)
            and type(loss_fn).forward is kind.forward
            and "forward" not in vars(loss_fn)
        ):
            return _with_options(known, {**vars(loss_fn), **loss_fn._buffers})
    return None


def _with_options(known: KnownLoss, options: dict[str, Any]) -> KnownLoss:
    if known.kind != "classes":
        return known
    return replace(
        known,
        weight=options.get("weight", known.weight),
        ignore_index=options.get("ignore_index", known.ignore_index),
    )


def declared_reduction(loss_fn: object) -> object:
    """Return the ``reduction`` that a loss states, as an attribute or a keyword."""
    if isinstance(loss_fn, partial):
        return loss_fn.keywords.get("reduction", declared_reduction(loss_fn.func))
    return getattr(loss_fn, "reduction", None)


class ModelLoss:
    """The loss that a model returns itself, for ``loss_fn="model"``.

    It is the outputs where they are a scalar, their ``loss``, or their only scalar.
    """

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss among the outputs.

        Raises:
            LossShapeError: If there is none, or more than one.
        """
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        if isinstance(outputs, Mapping):
            loss = outputs.get("loss")
            if isinstance(loss, Tensor):
                return loss
        scalars = [
            t for t in tensors_in(outputs) if not t.ndim and t.is_floating_point()
        ]
        if len(scalars) == 1:
            return scalars[0]
        raise LossShapeError(
            "loss_fn='model' needs a model that returns its loss, as a scalar, .loss "
            f"or the only scalar of its outputs, got {type(outputs).__name__} with "
            f"{len(scalars)} scalars; does the model get its labels?"
        )


def own_loss_normalisers() -> list[Callable[[Any], Tensor | float] | None]:
    """Return what a model's own loss may divide by, from its labels.

    The examples; the labels that are not ignored; those after the first of a sequence,
    which a causal language model predicts.
    """

    def labels(targets: Any) -> Tensor | float:
        known = isinstance(targets, Tensor)
        return (targets != -100).sum() if known else math.nan

    def shifted(targets: Any) -> Tensor | float:
        known = isinstance(targets, Tensor) and targets.ndim > 1
        return (targets[..., 1:] != -100).sum() if known else math.nan

    return [None, labels, shifted]
