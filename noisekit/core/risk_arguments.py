"""Checks of what a risk is built from: each mistake is named, with what to do."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from noisekit.core.batches import tensors_in
from noisekit.core.errors import LossShapeError, UsageError


def check_arguments(model: object, loss_fn: object, batches: object) -> None:
    """Refuse arguments of other kinds, such as swapped ones.

    Raises:
        UsageError: With what each argument needs to be.
    """
    if isinstance(model, torch.optim.Optimizer):
        raise UsageError(
            "model needs to be a torch.nn.Module, got the optimizer "
            f"{type(model).__name__}; pass the model that it updates."
        )
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model needs to be a torch.nn.Module, got {type(model).__name__}; wrap a "
            "function in a module whose parameters it uses."
        )
    if callable(batches) and not isinstance(batches, Iterable):
        raise UsageError(
            "the arguments are (model, loss_fn, batches), got "
            f"{type(loss_fn).__name__} for the loss and {type(batches).__name__} for "
            "the batches; are the two swapped?"
        )
    if not callable(loss_fn):
        raise UsageError(
            "loss_fn needs to be a function of outputs and targets, or 'model' for a "
            f"model that returns its loss, got {_shown(loss_fn)}."
        )
    if not list(model.parameters()) and isinstance(loss_fn, nn.Module):
        raise UsageError(
            "the arguments are (model, loss_fn, batches), got "
            f"{type(model).__name__} without parameters for the model and "
            f"{type(loss_fn).__name__} for the loss; are the two swapped?"
        )
    _check_batches(batches)


def _check_batches(batches: object) -> None:
    if isinstance(batches, torch.utils.data.Dataset) and not isinstance(
        batches, torch.utils.data.IterableDataset
    ):
        raise UsageError(
            "batches needs to yield batches (inputs, targets), got the data set "
            f"{type(batches).__name__}, which yields single examples; pass "
            "torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise UsageError(
            "batches needs to be an iterable of pairs (inputs, targets), got "
            f"{_shown(batches)}; a single batch is written [(inputs, targets)]."
        )


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__


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
