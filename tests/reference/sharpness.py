"""Sharpness by definition: dense Hessians, every corner of a box, plain loops.

Nothing here imports noisekit.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call


def flat_loss(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> Callable[[Tensor], Tensor]:
    """The loss of one batch as a function of all weights in one vector."""
    named = dict(model.named_parameters())

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        weights = {
            name: part.view_as(p)
            for (name, p), part in zip(named.items(), parts, strict=True)
        }
        return loss_fn(functional_call(model, weights, (inputs,)), targets)

    return loss


def flat_weights(model: nn.Module) -> Tensor:
    """All weights in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def dense_hessian(loss: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """Every second derivative, row by row."""
    return torch.autograd.functional.hessian(loss, vector)


def corners(radius: Tensor) -> Iterator[Tensor]:
    """Every vertex of the box ``|y_i| <= radius_i``."""
    for signs in product((-1.0, 1.0), repeat=len(radius)):
        yield torch.tensor(signs, dtype=radius.dtype) * radius


def highest_corner(
    loss: Callable[[Tensor], Tensor], origin: Tensor, columns: Tensor, radius: Tensor
) -> float:
    """Largest loss at ``origin + columns y`` over the vertices of the box."""
    return max(float(loss(origin + columns @ y)) for y in corners(radius))


def keskar(rise: float, loss: float) -> float:
    """Keskar's percentage, from the rise and the loss at the point."""
    return 100 * rise / (1 + loss)


def subspace_radius(columns: np.ndarray, origin: np.ndarray, epsilon: float):
    """Half widths of Keskar's box in the span of ``columns``."""
    return epsilon * (np.abs(np.linalg.pinv(columns) @ origin) + 1)


def loss_and_error_between(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    alpha: float,
    data: tuple[Tensor, Tensor],
) -> tuple[float, float]:
    """Cross-entropy and error of a copy that lies between two state dicts."""
    twin = copy.deepcopy(model).eval()
    twin.load_state_dict(
        {
            key: (1 - alpha) * value + alpha * end[key]
            if value.is_floating_point()
            else value
            for key, value in start.items()
        }
    )
    inputs, targets = data
    with torch.no_grad():
        outputs = twin(inputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        error = (outputs.argmax(1) != targets).double().mean()
    return float(loss), float(error)


def unit_row_twin(model: nn.Sequential) -> nn.Sequential:
    """A copy whose layers just before a BatchNorm have rows of norm 1.

    The running statistics are changed such that the outputs stay what they were.
    """
    twin = copy.deepcopy(model)
    for layer, norm in itertools.pairwise(twin):
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        for row in range(len(layer.weight)):
            length = float(layer.weight.detach()[row].norm())
            with torch.no_grad():
                layer.weight[row] /= length
                if layer.bias is not None:
                    layer.bias[row] /= length
                norm.running_mean[row] /= length
                spread = (norm.running_var[row] + norm.eps) / length**2
                norm.running_var[row] = spread - norm.eps
    return twin
