"""Slow, obvious references for risk and curvature, in double precision.

They put the whole loss into one expression and differentiate it entry by entry.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LossFn = Callable[[Any, Any], Tensor]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return each trainable parameter once, in the order of the module tree."""
    return [p for p in model.parameters() if p.requires_grad]


def total_loss(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[tuple[Any, Any]],
    *,
    counts: Sequence[float],
    reduction: str,
) -> Tensor:
    """Return the loss over all batches, each weighted by its count."""
    total: Tensor | float = 0.0
    for (inputs, targets), count in zip(batches, counts, strict=True):
        if isinstance(inputs, dict):
            outputs = model(**inputs)
        elif isinstance(inputs, tuple):
            outputs = model(*inputs)
        else:
            outputs = model(inputs)
        loss = loss_fn(outputs, targets)
        total = total + (count * loss if reduction == "mean" else loss)
    return total / sum(counts)


def gradient_and_hessian(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[tuple[Any, Any]],
    *,
    counts: Sequence[float],
    reduction: str = "mean",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient and the dense Hessian, row by row."""
    model = deepcopy(model).eval()
    parameters = trainable(model)
    with sdpa_kernel(SDPBackend.MATH):
        loss = total_loss(model, loss_fn, batches, counts=counts, reduction=reduction)
        gradient = flat(
            torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True),
            parameters,
        )
    rows = [
        flat(
            torch.autograd.grad(
                entry, parameters, retain_graph=True, allow_unused=True
            ),
            parameters,
        )
        if entry.requires_grad
        else torch.zeros(len(gradient), dtype=gradient.dtype)
        for entry in gradient
    ]
    return gradient.detach().numpy(), torch.stack(rows).detach().numpy()


def flat(
    gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """Return one vector, zero where there is no gradient."""
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1)
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )


def symmetric_with_spectrum(values: Sequence[float], seed: int = 0) -> np.ndarray:
    """Return a dense symmetric matrix with the given eigenvalues."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    matrix = (basis * np.asarray(values)) @ basis.T
    return (matrix + matrix.T) / 2
