"""Checks of what a risk is built from: each mistake is named, with what to do."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from noisekit.core.arguments import shown
from noisekit.core.errors import UsageError


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
            f"model that returns its loss, got {shown(loss_fn)}."
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
            f"{shown(batches)}; a single batch is written [(inputs, targets)]."
        )
