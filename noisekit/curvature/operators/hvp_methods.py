"""Hessian-vector products (HVP) of one batch's loss, in each form of autograd."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import grad, jvp, linearize

from noisekit.core.batches import Batch
from noisekit.core.params import flatten
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature.operators.graph_cache import check_twice_differentiable

Product = Callable[[Tensor], Tensor]
Form = Callable[[EmpiricalRisk, float, Batch], Product]


def reverse_over_reverse(risk: EmpiricalRisk, weight: float, batch: Batch) -> Product:
    """Return products ``v -> grad <weight grad L, v>``, by the gradient's own graph.

    About two gradient evaluations each, and two to build the graph.

    Source:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    leaves = risk.leaves
    # grad L as a function of the weights, with its graph.
    gradient = risk.gradients(weight * risk.loss_of(batch), create_graph=True)
    check_twice_differentiable(gradient)
    return transposed_jacobian_product(gradient, leaves, risk)


def transposed_jacobian_product(
    outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...], risk: EmpiricalRisk
) -> Product:
    """Return ``v -> grad <outputs, v>`` by the graph of ``outputs``, which is retained.

    Zero where the outputs are constant.
    """
    split = risk.layout.split
    used = [i for i, output in enumerate(outputs) if output.requires_grad]
    attached = [outputs[i] for i in used]

    def product(vector: Tensor) -> Tensor:
        if not used:
            return torch.zeros_like(vector)
        parts = split(vector)
        # v as the cotangent of the outputs: the inner product itself is not formed.
        products = torch.autograd.grad(
            attached,
            leaves,
            [
                parts[i].to(output.dtype)
                for i, output in zip(used, attached, strict=True)
            ],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return flatten(products)

    return product


def linearised(risk: EmpiricalRisk, weight: float, batch: Batch) -> Product:
    """Return products by the linearized gradient, traced once (forward over reverse).

    For convolutions cheaper than the reverse over the reverse, since the derivative
    of a convolution's backward pass is written for it; tracing costs 10 to 70 gradient
    evaluations per batch.
    """
    function, point = _loss_function(risk, weight, batch)
    with _forward_mode():
        _, derivative = linearize(grad(function), point)
    split = risk.layout.split

    def product(vector: Tensor) -> Tensor:
        parts = zip(split(vector), point, strict=True)
        # Parameters that were not chosen are constants of the trace, and want graphs.
        with torch.no_grad():
            return flatten(derivative(tuple(v.to(p.dtype) for v, p in parts)))

    return product


def forward_over_reverse(risk: EmpiricalRisk, weight: float, batch: Batch) -> Product:
    """Return products ``d/dt grad L(w + t v)``, by forward mode over the gradient.

    About four gradient evaluations each. No graph is stored between products, and
    within one none of the gradient, so that it takes the least memory. Products have to
    be made in evaluation mode.
    """
    function, point = _loss_function(risk, weight, batch)
    split = risk.layout.split

    def product(vector: Tensor) -> Tensor:
        parts = zip(split(vector), point, strict=True)
        tangents = tuple(v.to(p.dtype) for v, p in parts)
        with _forward_mode():
            return flatten(jvp(grad(function), (point,), (tangents,))[1])

    return product


def finite_difference(step: float) -> Form:
    """Return the form that takes central differences of gradients.

    Args:
        step: Length of the displacement to either side, whatever the length of the
            vector.
    """

    def form(risk: EmpiricalRisk, weight: float, batch: Batch) -> Product:
        start = risk.vector()

        def slope(point: Tensor) -> Tensor:
            with risk.at(point):
                return flatten(risk.gradients(weight * risk.loss_of(batch)))

        def product(vector: Tensor) -> Tensor:
            length = float(vector.double().norm())
            if length == 0.0:
                return torch.zeros_like(vector)
            move = vector.to(start.dtype) * (step / length)
            # H v = |v| H u with the unit vector u, so that the step has this length.
            difference = slope(start + move) - slope(start - move)
            return (difference * (length / (2 * step))).to(vector.dtype)

        return product

    return form


def _loss_function(
    risk: EmpiricalRisk, weight: float, batch: Batch
) -> tuple[Callable[[tuple[Tensor, ...]], Tensor], tuple[Tensor, ...]]:
    """The weighted loss as a function of the chosen parameters, and where they are."""
    names = risk.layout.names

    def function(point: tuple[Tensor, ...]) -> Tensor:
        chosen = dict(zip(names, point, strict=True))
        return weight * risk.loss_at(risk.outputs_of(batch, chosen), batch[1])

    return function, tuple(leaf.detach() for leaf in risk.leaves)


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Without graphs of other parameters, and without PyTorch's own deprecations."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr")
        yield
