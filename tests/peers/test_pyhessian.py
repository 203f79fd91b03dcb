"""Where PyHessian's eigenvalues are wrong, on problems whose Hessian is known.

Each test first shows the failure, so that it says when it has been mended.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from pyhessian import hessian
from torch import Tensor, nn

from noisekit.core.results import Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import (
    HessianOperator,
    pyhessian_top_eigenvalue,
    spectral_density,
    top_eigenpairs,
)
from tests.randomness import seeded
from tests.reference.curvature import symmetric_with_spectrum

ONE_BATCH = (torch.zeros(4, 1), torch.zeros(4))
BOTH_ENDS = [1.0, *np.linspace(-0.9, 0.9, 60), -0.99]
Batches = list[tuple[Tensor, Tensor]]


class Quadratic(nn.Module):
    """``w' A w / 2``, so that the Hessian is ``A``."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        matrix = torch.from_numpy(symmetric_with_spectrum(eigenvalues))
        self.matrix = matrix.to(torch.get_default_dtype())
        self.w = nn.Parameter(torch.ones(len(eigenvalues)))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.w @ self.matrix @ self.w / 2).expand(len(inputs))


def mean_output(outputs: Tensor, targets: Tensor) -> Tensor:
    del targets
    return outputs.mean()


def peer(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], data: Any
) -> hessian:
    """PyHessian's object, of a batch or of a list of them."""
    given = {"dataloader": data} if isinstance(data, list) else {"data": data}
    return hessian(model, loss_fn, cuda=False, **given)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Its gradients hold a graph, which PyTorch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        yield


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_two_values_alike_are_no_eigenvalue() -> None:
    """With both ends alike its rule stops anywhere between them, without a word."""
    values = []
    for seed in range(10):
        torch.manual_seed(seed)
        found, _ = peer(Quadratic(BOTH_ENDS), mean_output, ONE_BATCH).eigenvalues()
        values.append(found[0])
    assert min(values) < 0.5
    H = HessianOperator(Quadratic(BOTH_ENDS), mean_output, [ONE_BATCH])
    for seed in range(10):
        pairs = top_eigenpairs(H, generator=seeded(seed))
        assert pairs.converged
        assert float(pairs.values[0]) == pytest.approx(1.0, rel=1e-3)


def test_its_value_is_not_that_of_its_vector() -> None:
    """It returns the last value but one, and the vector after the last."""
    spectrum = [1.0, 0.8, *np.linspace(0, 0.5, 20)]
    model = Quadratic(spectrum)
    torch.manual_seed(0)
    [value], [vector] = peer(model, mean_output, ONE_BATCH).eigenvalues(tol=0.05)
    v = vector[0] / vector[0].norm()
    assert abs(float(v @ model.matrix @ v) - value) > 0.01
    ours = top_eigenpairs(model.matrix, tol=0.05, generator=seeded())
    v = ours.vectors[:, 0]
    assert float(v @ model.matrix @ v) == pytest.approx(float(ours.values[0]), rel=1e-5)


def test_several_values_are_neither_sorted_nor_right() -> None:
    """Ten values between 0.9 and 1, of which it calls lower ones the first."""
    spectrum = [*np.linspace(0.9, 1.0, 10), *np.linspace(-0.1, 0.5, 60)]
    firsts, unsorted = [], 0
    for seed in range(8):
        torch.manual_seed(seed)
        found, _ = peer(Quadratic(spectrum), mean_output, ONE_BATCH).eigenvalues(
            top_n=3
        )
        firsts.append(found[0])
        unsorted += found != sorted(found, reverse=True)
    assert min(firsts) < 0.98
    assert unsorted > 0
    H = HessianOperator(Quadratic(spectrum), mean_output, [ONE_BATCH])
    pairs = top_eigenpairs(H, 3, tol=1e-4, generator=seeded())
    want = np.sort(spectrum)[:-4:-1]
    np.testing.assert_allclose(pairs.values.numpy(), want, rtol=1e-4)


def test_the_largest_magnitude_is_not_the_largest() -> None:
    """The smallest eigenvalue is its answer where that is the further from zero."""
    model = Quadratic([1.0, 0.5, 0.0, -2.0])
    torch.manual_seed(0)
    [value], _ = peer(model, mean_output, ONE_BATCH).eigenvalues()
    assert value == pytest.approx(-2.0, rel=1e-2)
    risk = EmpiricalRisk(model, mean_output, [ONE_BATCH])
    top = top_eigenpairs(HessianOperator(risk), generator=seeded())
    assert float(top.values[0]) == pytest.approx(1.0, rel=1e-3)
    kept_apart = pyhessian_top_eigenvalue(risk, generator=seeded())
    assert kept_apart.status is Status.NOT_COMPARABLE


def test_a_second_object_doubles_the_hessian() -> None:
    """It adds to ``.grad`` and differentiates that, also what another left there."""
    model = Quadratic([3.0, 1.0, 0.0])
    torch.manual_seed(0)
    first = peer(model, mean_output, ONE_BATCH)
    [twice], _ = peer(model, mean_output, ONE_BATCH).eigenvalues()
    [once], _ = first.eigenvalues()
    assert [once, twice] == pytest.approx([3.0, 6.0], rel=1e-3)
    for _ in range(2):
        H = HessianOperator(model, mean_output, [ONE_BATCH])
        ours = top_eigenpairs(H, generator=seeded())
        assert float(ours.values[0]) == pytest.approx(3.0, rel=1e-5)


def test_the_model_is_not_given_back_as_it_was() -> None:
    """Its mode is changed, and a gradient with a graph of its own is left."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    data = (torch.randn(5, 3, generator=seeded()), torch.tensor([0, 1, 0, 1, 1]))
    peer(model, nn.CrossEntropyLoss(), data)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is not None and p.grad.requires_grad for p in model.parameters())
    ours = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    top_eigenpairs(HessianOperator(ours, nn.CrossEntropyLoss(), [data]))
    assert all(module.training for module in ours.modules())
    assert all(p.grad is None for p in ours.parameters())


def test_its_vectors_are_not_of_unit_length() -> None:
    """It divides by the length and a millionth: values are two millionths too small."""
    with default_type(torch.float64):
        model = Quadratic([1.0, *np.linspace(-0.1, 0.1, 20)])
        torch.manual_seed(0)
        [value], _ = peer(model, mean_output, ONE_BATCH).eigenvalues(tol=1e-12)
        assert value - 1.0 == pytest.approx(-2e-6, rel=1e-3)
        H = HessianOperator(model, mean_output, [ONE_BATCH])
        ours = top_eigenpairs(H, tol=1e-9, generator=seeded())
    assert float(ours.values[0]) == pytest.approx(1.0, abs=1e-12)


def test_its_density_is_gone_with_the_routine_it_called() -> None:
    """``torch.eig`` was removed from PyTorch."""
    model = Quadratic([3.0, 1.0, 0.0])
    with pytest.raises((RuntimeError, AttributeError)):
        peer(model, mean_output, ONE_BATCH).density(iter=3, n_v=1)
    ours = spectral_density(
        HessianOperator(model, mean_output, [ONE_BATCH]), generator=seeded()
    )
    assert ours.nodes[0] == pytest.approx([0.0, 1.0, 3.0], abs=1e-5)


def test_parameters_without_a_gradient_end_it() -> None:
    """Ours have a curvature of zero."""
    model = nn.Linear(3, 1)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    data = (torch.randn(5, 3, generator=seeded()), torch.zeros(5, 1))
    with pytest.raises(AssertionError, match=r"output to be a torch\.Tensor"):
        peer(model, nn.MSELoss(), data).eigenvalues()
    dense = HessianOperator(model, nn.MSELoss(), [data]).to_dense()
    assert dense.shape == (6, 6)
    assert int((dense.abs().sum(0) == 0).sum()) == 2


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_batches_are_weighted_by_examples_whatever_the_loss(reduction: str) -> None:
    """Right for means over examples only.

    Of sums its value is neither the largest eigenvalue of the sum nor of the mean.
    """
    inputs = torch.randn(12, 3, generator=seeded())
    targets = torch.randint(2, (12,), generator=seeded())
    if reduction == "token_mean":
        targets[:5] = -100  # of the first batch one alone counts
    loss_fn = nn.CrossEntropyLoss(reduction=reduction.removeprefix("token_"))
    batches = list(zip(inputs.split(6), targets.split(6), strict=True))
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    H = HessianOperator(model, loss_fn, batches)
    truth = whole_hessian(model, inputs, targets)
    torch.manual_seed(0)
    [theirs], _ = peer(model, loss_fn, batches).eigenvalues(tol=1e-6, maxIter=300)
    model.zero_grad()
    ours = top_eigenpairs(H, tol=1e-6, generator=seeded())
    assert float(ours.values[0]) == pytest.approx(truth, rel=1e-4)
    for right in (truth, truth * H.risk.total):
        assert abs(theirs / right - 1) > 0.05


def whole_hessian(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The largest eigenvalue over all data at once, by nested differentiation."""

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        outputs = inputs @ weight.T + bias
        return nn.functional.cross_entropy(outputs, targets)

    point = tuple(p.detach() for p in model.parameters())
    rows = torch.autograd.functional.hessian(loss, point)
    sizes = [p.numel() for p in point]
    blocks = [
        [block.reshape(sizes[i], sizes[j]) for j, block in enumerate(row)]
        for i, row in enumerate(rows)
    ]
    dense = torch.cat([torch.cat(row, 1) for row in blocks])
    return float(torch.linalg.eigvalsh(dense)[-1])
