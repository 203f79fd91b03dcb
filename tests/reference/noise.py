"""Per-example gradients by one backward pass per example; slow and obvious."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def example_gradients(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    batch_dim: int = 0,
) -> dict[str, Tensor]:
    """By parameter ``(N, *shape)``: the gradient of each example's own loss."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(inputs.shape[batch_dim]):
        one = inputs.narrow(batch_dim, i, 1)
        for parameter in named.values():
            parameter.grad = None
        loss_fn(model(one), targets[i : i + 1]).backward()
        for name, p in named.items():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
    for parameter in named.values():
        parameter.grad = None
    return {name: torch.stack(row) for name, row in rows.items()}


def sq_norms(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """By parameter ``(N,)``: the squared norm of each example's gradient."""
    return {name: g.flatten(1).square().sum(1) for name, g in grads.items()}


def variance_trace(grads: Sequence[Tensor]) -> float:
    """Trace of the covariance of the rows, with n - 1, over all tensors."""
    return sum(float(g.flatten(1).var(0, correction=1).sum()) for g in grads)


def debiased_grad_sq_norm(grads: Sequence[Tensor]) -> float:
    """Mean inner product of the gradients of two different examples."""
    rows = torch.cat([g.flatten(1) for g in grads], 1)
    gram = rows @ rows.T
    n = len(rows)
    return float((gram.sum() - gram.diagonal().sum()) / (n * (n - 1)))


def module_gradients(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, *, axis: int = 0
) -> dict[str, Tensor]:
    """The same for one module, given the gradient of its output."""
    named = dict(module.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(inputs.shape[axis]):
        output = module(inputs.narrow(axis, i, 1))
        grads = torch.autograd.grad(
            output, list(named.values()), output_grads.narrow(axis, i, 1)
        )
        for name, grad in zip(named, grads, strict=True):
            rows[name].append(grad)
    return {name: torch.stack(row) for name, row in rows.items()}
