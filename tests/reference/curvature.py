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
        loss = loss_fn(outputs_of(model, inputs), targets)
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


def output_jacobian(outputs: Tensor, parameters: Sequence[nn.Parameter]) -> np.ndarray:
    """Return one row per output entry, each by a backward pass of its own."""
    rows = [
        flat(
            torch.autograd.grad(
                entry, parameters, retain_graph=True, allow_unused=True
            ),
            parameters,
        )
        for entry in outputs.reshape(-1)
    ]
    return torch.stack(rows).numpy()


def gauss_newton(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[tuple[Any, Any]],
    *,
    counts: Sequence[float],
    reduction: str = "mean",
) -> np.ndarray:
    """Return ``sum J' (d2L/dz2) J``, with both factors written out, batch by batch."""
    model = deepcopy(model).eval()
    parameters = trainable(model)
    total: np.ndarray | float = 0.0
    for (inputs, targets), count in zip(batches, counts, strict=True):
        outputs = outputs_of(model, inputs)
        jacobian = output_jacobian(outputs, parameters)
        curvature = torch.autograd.functional.hessian(
            lambda z, targets=targets: loss_fn(z, targets), outputs.detach()
        )
        size = outputs.numel()
        factor = count if reduction == "mean" else 1.0
        matrix = curvature.reshape(size, size).numpy()
        total = total + factor * jacobian.T @ matrix @ jacobian
    return total / sum(counts)


def categorical_fisher(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    *,
    weight_of: Callable[[int], float],
    observed: bool = False,
) -> np.ndarray:
    """Return the Fisher matrix of softmax outputs, class by class, target by target.

    ``observed`` takes the target in place of every class by its probability.
    """
    model = deepcopy(model).eval()
    parameters = trainable(model)
    total: np.ndarray | float = 0.0
    weights = 0.0
    for inputs, targets in batches:
        outputs = outputs_of(model, inputs).movedim(1, -1).flatten(0, -2)
        for logits, target in zip(outputs, targets.reshape(-1), strict=True):
            weight = weight_of(int(target))
            weights += weight
            if weight == 0.0:
                continue
            log_p = logits.log_softmax(0)
            for label in [int(target)] if observed else range(len(logits)):
                probability = 1.0 if observed else float(log_p[label].detach().exp())
                gradient = flat(
                    torch.autograd.grad(
                        log_p[label], parameters, retain_graph=True, allow_unused=True
                    ),
                    parameters,
                ).numpy()
                total = total + weight * probability * np.outer(gradient, gradient)
    return total / weights


def batch_gradients(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[tuple[Any, Any]]
) -> np.ndarray:
    """Return the gradient of each batch's loss, one per row."""
    model = deepcopy(model).eval()
    parameters = trainable(model)
    rows = []
    for inputs, targets in batches:
        loss = loss_fn(outputs_of(model, inputs), targets)
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(flat(gradient, parameters))
    return torch.stack(rows).numpy()


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """Return the outputs, for inputs of any form; with double derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
