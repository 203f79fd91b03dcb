"""Warm start of Lanczos: the Hessian over a random subsample of the data."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.data import HeldBatches
from noisekit.core.evaluation_mode import batch_norms
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.operators.operator import SymmetricOperator

SHARE = 8
MIN_EXAMPLES = 1024


def can_be_subsampled(operator: SymmetricOperator) -> bool:
    """Whether a subsample of the data gives a useful warm start."""
    if type(operator) is not HessianOperator:
        return False
    risk = operator.risk
    coupled = risk.bn == "batch" and bool(batch_norms(risk.model))
    here = risk.ranks.alone and isinstance(risk.batches, HeldBatches)
    return here and risk.checked and not coupled and risk.num_examples >= MIN_EXAMPLES


def subsampled_hessian(
    operator: SymmetricOperator, generator: torch.Generator
) -> HessianOperator | None:
    """Return the Hessian over a random eighth of the examples, all batches alike.

    Its vectors are only a place to start from: nothing that is measured with them
    depends on which examples were drawn.

    Returns:
        ``None`` where that is not worth it or not possible: below 1,024 examples,
        where data are read again on each pass, examples are not separable, the
        loss couples them through BatchNorm, or other ranks hold more of them.
    """
    if not can_be_subsampled(operator):
        return None
    assert isinstance(operator, HessianOperator)
    risk = operator.risk
    drawn: list[Batch] = []
    for _, batch in risk.weighted_batches():
        count = count_examples(batch)
        order = torch.randperm(count, generator=generator, device=generator.device)
        rows = order[: max(1, count // SHARE)].sort().values
        drawn.append(take_examples(batch, rows))
    return HessianOperator(risk.on(together(drawn)))


def together(batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches as a single one, or as they are where shapes do not fit."""
    try:
        return [_joined(batches)]
    except (RuntimeError, TypeError, ValueError):
        return list(batches)


# Batches are whatever the loader yields.
def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values)) if first.ndim else _shared(values)
    if isinstance(first, Mapping):
        return {key: _joined([value[key] for value in values]) for key in first}
    if isinstance(first, tuple | list):
        parts = [_joined(items) for items in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return _shared(values)


def _shared(values: Sequence[Any]) -> Any:
    if any(bool(value != values[0]) for value in values[1:]):
        raise ValueError("the batches need one value in common, got several.")
    return values[0]
