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
    return {name: g.reshape(len(g), -1).square().sum(1) for name, g in grads.items()}


def variance_trace(grads: Sequence[Tensor]) -> float:
    """Trace of the covariance of the rows, with n - 1, over all tensors."""
    return sum(float(g.reshape(len(g), -1).var(0, correction=1).sum()) for g in grads)


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


def contributions(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Tensor,
) -> dict[str, Tensor]:
    """By parameter ``(N, *shape)``: what each example adds to the batch's gradient.

    The model sees one example at a time; the loss sees all outputs, so that whatever it
    divides by is what it divides by in training.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    outputs = [model(*(t[i : i + 1] for t in inputs)) for i in range(len(inputs[0]))]
    leaf = torch.cat([output.detach() for output in outputs]).requires_grad_()
    (leaf_grad,) = torch.autograd.grad(loss_fn(leaf, targets), leaf)
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for output, grad in zip(outputs, leaf_grad.split(1), strict=True):
        grads = torch.autograd.grad(
            output,
            list(named.values()),
            grad,
            allow_unused=True,
            materialize_grads=True,
        )
        for name, g in zip(named, grads, strict=True):
            rows[name].append(g)
    return {name: torch.stack(row) for name, row in rows.items()}


def unit_noise(
    rows: Tensor, weights: Tensor, sizes: Tensor | None = None
) -> tuple[float, float]:
    """``tr Σ`` per example and ``|G|²`` from ``(K, P)`` gradients of single units.

    Unit ``k`` is the mean over ``sizes[k]`` examples and weighs ``weights[k]`` in the
    whole's mean. Products of two different units have mean ``|G|²``; what a unit's own
    square has beyond that is its share of the noise.
    """
    sizes = torch.ones_like(weights) if sizes is None else sizes
    parts = weights[:, None] * rows
    gram = parts @ parts.T
    pairs = weights[:, None] * weights
    own = torch.eye(len(rows), dtype=torch.bool)
    norm = gram[~own].sum() / pairs[~own].sum()
    trace = (gram[own].sum() - pairs[own].sum() * norm) / (weights**2 / sizes).sum()
    return float(trace), float(norm)


def norm_test(rows: Tensor) -> float:
    """Root of the mean gradient's estimated squared error over its squared norm."""
    n, mean = len(rows), rows.mean(0)
    error = sum(float((row - mean).square().sum()) for row in rows) / (n - 1) / n
    return (error / float(mean.square().sum())) ** 0.5


def inner_product_test(rows: Tensor) -> float:
    """The same of the examples' inner products with the mean gradient."""
    n, mean = len(rows), rows.mean(0)
    whole = float(mean @ mean)
    error = sum((float(row @ mean) - whole) ** 2 for row in rows) / (n - 1) / n
    return error**0.5 / whole


def orthogonality_test(rows: Tensor) -> float:
    """The same of what is left of the examples across the mean gradient."""
    n, mean = len(rows), rows.mean(0)
    whole = float(mean @ mean)
    across = [row - float(row @ mean) / whole * mean for row in rows]
    error = sum(float(row.square().sum()) for row in across) / (n - 1) / n
    return (error / whole) ** 0.5


def gradient_diversity(rows: Tensor) -> float:
    """Sum of squared norms over squared norm of the sum."""
    return float(rows.square().sum() / rows.sum(0).square().sum())


def biased_variance_trace(rows: Tensor) -> float:
    """Sum over parameters of mean square less squared mean, with 1/n."""
    return float((rows.square().mean(0) - rows.mean(0).square()).sum())


def signal_to_noise(rows: Tensor) -> float:
    """Squared mean over unbiased variance, averaged over parameters that vary."""
    ratios = [
        float(column.mean() ** 2 / column.var())
        for column in rows.T
        if float(column.var()) > 1e-30
    ]
    return sum(ratios) / len(ratios)


def dense_hessian(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> Tensor:
    """Second derivatives of the mean loss, one row at a time ``(P, P)``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = loss_fn(model(inputs), targets)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([grad.flatten() for grad in grads])
    rows = []
    for entry in flat:
        parts = torch.autograd.grad(
            entry, parameters, retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def token_noise_scale(sums: Tensor, counts: Tensor) -> float:
    """Of all sequences there are: tokens at which noise and signal are alike.

    To first order in ``1/m``, the noise of ``sum s_i / sum t_i`` over ``m`` of them.

    Args:
        sums: Each sequence's gradient, summed over its tokens ``(N, P)``.
        counts: Its tokens ``(N,)``.
    """
    mean = sums.sum(0) / counts.sum()
    residuals = sums - counts[:, None] * mean
    noise = residuals.square().sum() / counts.sum()
    return float(noise / mean.square().sum())
