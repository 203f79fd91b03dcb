"""Sums, multiples, shifts and other coordinates of operators, against matrices."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.testing import assert_close

from noisekit.core.errors import UsageError
from noisekit.curvature import (
    GGNOperator,
    HessianOperator,
    ScaledOperator,
    adam_preconditioned,
    as_operator,
    weight_scaled,
)
from tests.cases import RAGGED, mlp, seeded
from tests.reference.curvature import symmetric_with_spectrum

LOSS = nn.CrossEntropyLoss()
A = torch.from_numpy(symmetric_with_spectrum([4.0, 1.0, 0.5, -2.0], seed=0))
B = torch.from_numpy(symmetric_with_spectrum([3.0, 1.0, 0.0, -1.0], seed=1))
EYE = torch.eye(4, dtype=torch.float64)


def test_combinations_are_those_of_the_matrices() -> None:
    """Catches: a shift of every entry in place of the diagonal."""
    a, b = as_operator(A), as_operator(B)
    for operator, want in (
        (a + b, A + B),
        (a - b, A - B),
        (2 * a, 2 * A),
        (a * 0.5, 0.5 * A),
        (-a, -A),
        (a.shifted(3.0), A + 3 * EYE),
        ((2 * a - b).shifted(-1.0), 2 * A - B - EYE),
    ):
        assert_close(operator.to_dense(), want, rtol=1e-14, atol=1e-14)
        assert_close(operator @ A[0], want @ A[0], rtol=1e-13, atol=1e-13)


def test_model_curvature_is_the_hessian_without_gauss_newton() -> None:
    """Operators of one model combine, and SciPy solves what comes out."""
    model = seeded(mlp)()
    H, G = HessianOperator(model, LOSS, RAGGED), GGNOperator(model, LOSS, RAGGED)
    rest = H - G
    want = H.to_dense() - G.to_dense()
    assert_close(rest.to_dense(), want, rtol=1e-10, atol=1e-13)
    values = eigsh(rest.to_scipy(), k=2, which="SA", return_eigenvectors=False)
    exact = np.linalg.eigvalsh(want.numpy())[:2]
    np.testing.assert_allclose(np.sort(values), exact, rtol=1e-7)


def test_combined_products_are_counted() -> None:
    a = as_operator(A)
    total = a + a
    total @ EYE
    assert (total.num_matvecs, a.num_matvecs) == (4, 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"operators of one size .* got 3 on cpu, 4 on"
    ):
        as_operator(A) + as_operator(torch.eye(3, dtype=torch.float64))
    with pytest.raises(TypeError):
        as_operator(A) + 1.0  # type: ignore[operator]
    with pytest.raises(TypeError):
        as_operator(A) - 1.0  # type: ignore[operator]
    with pytest.raises(TypeError):
        as_operator(A) * as_operator(A)  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"scales needs shape \(4,\), got \(3,\)"):
        ScaledOperator(as_operator(A), torch.ones(3))


class Rescaled(nn.Module):
    """Two layers around a ReLU, with the same function at any ``alpha``."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        base = seeded(mlp)()
        self.first, self.second = base[0], base[3]
        with torch.no_grad():
            self.first.weight.mul_(alpha)
            self.first.bias.mul_(alpha)
            self.second.weight.div_(alpha)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(inputs)))


def test_weight_scaled_eigenvalues_survive_rescaling() -> None:
    """Catches: ``w`` of the model that was, and scaling on one side only."""
    values = []
    plain = []
    for alpha in (1.0, 4.0):
        H = HessianOperator(Rescaled(alpha), LOSS, RAGGED)
        values.append(torch.linalg.eigvalsh(weight_scaled(H).to_dense()))
        plain.append(torch.linalg.eigvalsh(H.to_dense())[-1])
    assert_close(values[0], values[1], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(*plain, rtol=0.1)


def test_weight_scaled_follows_the_weights() -> None:
    model = seeded(mlp)()
    H = HessianOperator(model, LOSS, RAGGED)
    scaled = weight_scaled(H)
    scaled.to_dense()
    with torch.no_grad():
        model[0].weight[0].zero_()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).abs()
    want = weights[:, None] * H.to_dense() * weights
    assert_close(scaled.to_dense(), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adams_coordinates_are_those_of_its_steps(amsgrad: bool) -> None:
    """A step of Adam is ``lr P^{-1} m``, with the running mean of gradients ``m``.

    Catches: no bias correction, the square root of ``v`` plus ``eps`` the wrong way
    round, ``P^{-1}`` in place of its root.
    """
    model = seeded(mlp)()
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, amsgrad=amsgrad, eps=1e-3)
    H = HessianOperator(model, LOSS, RAGGED)
    scaled = adam_preconditioned_after(optimizer, H, steps=4)
    before = H.risk.vector()
    optimizer.zero_grad()
    LOSS(model.eval()(RAGGED[0][0]), RAGGED[0][1]).backward()
    optimizer.step()
    moved = (before - H.risk.vector()) / 1e-3
    mean = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in parameters])
    inverse_root = scaled._scales()
    assert_close(inverse_root**2 * mean, moved, rtol=1e-9, atol=1e-9)
    want = inverse_root[:, None] * H.to_dense() * inverse_root
    assert_close(scaled.to_dense(), want, rtol=1e-12, atol=1e-15)


def adam_preconditioned_after(
    optimizer: torch.optim.Adam, H: HessianOperator, *, steps: int
) -> ScaledOperator:
    for step in range(steps):
        inputs, targets = RAGGED[step % 3]
        optimizer.zero_grad()
        LOSS(H.risk.model.eval()(inputs), targets).backward()
        optimizer.step()
    return adam_preconditioned(H, optimizer)


def test_adam_without_a_state_is_refused() -> None:
    model = seeded(mlp)()
    H = HessianOperator(model, LOSS, RAGGED)
    with pytest.raises(UsageError, match=r"has taken no step for '0.weight'; choose"):
        adam_preconditioned(H, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UsageError, match=r"does not hold '0.weight'"):
        adam_preconditioned(H, torch.optim.Adam(model[3].parameters()))
    sgd: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        UsageError, match=r"torch.optim.Adam or a torch.optim.AdamW, got a SGD; give an"
    ):
        adam_preconditioned(H, sgd)
