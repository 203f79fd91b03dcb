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


def highest_in_ball(gradient: np.ndarray, hessian: np.ndarray, radius: float) -> float:
    """Largest of ``g z + z H z / 2`` over ``|z| <= radius``, by the secular equation.

    On the sphere the maximiser solves ``(nu - H) z = g`` with ``nu`` above the top
    eigenvalue; inside there is none unless ``H`` is negative definite.
    """
    values, vectors = np.linalg.eigh(hessian)
    along = vectors.T @ gradient
    if np.allclose(along, 0):
        return max(0.0, values[-1]) * radius**2 / 2
    low, high = values[-1], values[-1] + np.linalg.norm(gradient) / radius
    for _ in range(200):
        nu = (low + high) / 2
        length = np.linalg.norm(along / (nu - values))
        low, high = (nu, high) if length > radius else (low, nu)
    z = along / (high - values)
    return float(along @ z + (values * z**2).sum() / 2)


def fisher_rao_by_class(model: nn.Module, inputs: Tensor) -> list[float]:
    """``sum_k p_k (w . grad log p_k)^2`` of each example, one backward per class."""
    weights = flat_weights(model)
    found = []
    for row in inputs:
        logs = model(row[None]).log_softmax(1)[0]
        total = 0.0
        for entry in logs:
            grads = torch.autograd.grad(
                entry, list(model.parameters()), retain_graph=True
            )
            slope = float(torch.cat([g.reshape(-1) for g in grads]) @ weights)
            total += float(entry.detach().exp()) * slope**2
        found.append(total)
    return found


def relative_flatness_of_matrix(matrix: Tensor, hessian: Tensor) -> float:
    """``sum_{s,s'} <w_s, w_s'> tr H_ss'`` by loops, of one layer's own Hessian."""
    rows, columns = matrix.shape
    blocks = hessian.view(rows, columns, rows, columns)
    total = 0.0
    for s in range(rows):
        for t in range(rows):
            trace = sum(float(blocks[s, i, t, i]) for i in range(columns))
            total += float(matrix[s] @ matrix[t]) * trace
    return total


def spectral_radius_of_sgd(curvature: float, **options: float | bool) -> float:
    """Largest growth of ``torch.optim.SGD`` itself on ``curvature w^2 / 2``.

    Its linear map of weight and velocity is read off two steps, one from each unit
    vector, so that no formula for the update is needed.
    """
    columns = []
    for weight, velocity in ((1.0, 0.0), (0.0, 1.0)):
        parameter = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], **options)
        buffer = torch.tensor([velocity], dtype=torch.float64)
        optimizer.state[parameter]["momentum_buffer"] = buffer
        parameter.grad = curvature * parameter.detach()
        optimizer.step()
        after = optimizer.state[parameter]["momentum_buffer"]
        columns.append([float(parameter.detach()), float(after)])
    if not options.get("momentum"):
        return abs(columns[0][0])  # there is no velocity
    return float(np.abs(np.linalg.eigvals(np.array(columns).T)).max())
