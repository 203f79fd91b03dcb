"""PyHessian's answer, with each of its defects kept away."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import MissingPackageError, UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator, pyhessian_top_eigenvalue
from tests.cases import CASES, RAGGED, Case, batch_norm_network, mlp, seeded
from tests.randomness import seeded as seeded_generator
from tests.reference import curvature as reference

LOSS = nn.CrossEntropyLoss()


class Quadratic(nn.Module):
    """``w' A w / 2``, so that the Hessian is ``A``."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        matrix = reference.symmetric_with_spectrum(eigenvalues)
        self.matrix = torch.from_numpy(matrix)
        self.w = nn.Parameter(torch.ones(len(eigenvalues), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.w @ self.matrix @ self.w / 2).expand(len(inputs))


def quadratic_risk(eigenvalues: list[float]) -> EmpiricalRisk:
    return EmpiricalRisk(Quadratic(eigenvalues), lambda o, t: o.mean(), RAGGED)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_dense_hessian_of_every_case(case: Case) -> None:
    """Sum losses, class weights, ignored tokens, unused and tied parameters.

    Catches: PyHessian's own weighting by examples, its scale for sum losses (10.9 for
    36.5), its crash where a parameter has no gradient.
    """
    _, hessian = case.gradient_and_hessian()
    values = np.linalg.eigvalsh(hessian)
    risk = EmpiricalRisk(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    estimate = pyhessian_top_eigenvalue(
        risk, tol=1e-6, max_iterations=300, generator=seeded_generator(0)
    )
    extreme = max(values, key=abs)
    assert estimate.value == pytest.approx(extreme, rel=2e-3)
    expected = Status.OK if extreme > 0 else Status.NOT_COMPARABLE
    assert estimate.status is expected


def test_agrees_with_ours() -> None:
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    dense = HessianOperator(risk).to_dense().numpy()
    estimate = pyhessian_top_eigenvalue(risk, generator=seeded_generator(0))
    low, high = estimate.interval().low, estimate.interval().high
    assert any(low <= value <= high for value in np.linalg.eigvalsh(dense))
    assert estimate.error_source is ErrorSource.SOLVER
    assert estimate.num_matvecs > 2


def test_calls_in_a_row_agree() -> None:
    """Catches: gradients accumulated into ``.grad``, which doubles the second one."""
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    values = [
        pyhessian_top_eigenvalue(risk, generator=seeded_generator(0)).value
        for _ in range(3)
    ]
    assert values[0] == values[1] == values[2]


def test_the_lower_end_is_not_called_the_largest() -> None:
    """Catches: the eigenvalue of largest magnitude given for the largest."""
    estimate = pyhessian_top_eigenvalue(quadratic_risk([1.0, 0.5, 0.0, -2.0]))
    assert estimate.value == pytest.approx(-2.0, rel=1e-3)
    assert estimate.status is Status.NOT_COMPARABLE


def test_a_stop_far_from_any_eigenvalue_is_seen() -> None:
    """Both ends are as far from zero: its rule stops anywhere between.

    Catches: trusting two values in a row that are alike.
    """
    risk = quadratic_risk([1.0, *np.linspace(-0.5, 0.5, 30), -1.0])
    estimates = [
        pyhessian_top_eigenvalue(risk, tol=1e-3, generator=seeded_generator(seed))
        for seed in range(10)
    ]
    for estimate in estimates:
        if abs(abs(estimate.value) - 1.0) > 0.1:
            assert estimate.status is not Status.OK
            assert estimate.bound > 0.1
    assert any(e.status is not Status.OK for e in estimates)


def test_nothing_of_the_model_is_touched() -> None:
    """Mode, gradients, hooks, buffers and random state.

    Catches: ``eval()`` left behind, gradients with a graph left in ``.grad``, hooks on
    parameters that fire in PyHessian's backward passes.
    """
    model = seeded(batch_norm_network)().train()
    LOSS(model(RAGGED[0][0]), RAGGED[0][1]).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    objects = [p.grad for p in model.parameters()]
    fired = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    risk = EmpiricalRisk(model, LOSS, RAGGED)
    pyhessian_top_eigenvalue(risk)
    assert all(m.training for m in model.modules())
    after = [p.grad for p in model.parameters()]
    assert all(a is o for a, o in zip(after, objects, strict=True))
    assert all(torch.equal(a, g) for a, g in zip(after, grads, strict=True))
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not fired
    assert torch.equal(torch.get_rng_state(), random_state)


def test_subset_of_the_parameters() -> None:
    """Catches: PyHessian's lack of any choice."""
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED, params="3.*")
    dense = HessianOperator(risk).to_dense().numpy()
    estimate = pyhessian_top_eigenvalue(risk, tol=1e-8)
    assert estimate.value == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-4)


def test_weights_that_blew_up_end_at_once() -> None:
    """Catches: a thousand iterations on NaN."""
    model = seeded(mlp)()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    estimate = pyhessian_top_eigenvalue(EmpiricalRisk(model, LOSS, RAGGED))
    assert estimate.status is Status.DIVERGED
    assert estimate.num_matvecs == 0


def test_no_warning_reaches_the_user() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyhessian_top_eigenvalue(EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED))
    assert not caught


def test_arguments_are_checked() -> None:
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    with pytest.raises(UsageError, match=r"tol > 0 and max_iterations >= 1, got 0\.0"):
        pyhessian_top_eigenvalue(risk, tol=0.0)


def test_missing_package_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    with pytest.raises(MissingPackageError, match=r"pip install pyhessian==0\.1"):
        pyhessian_top_eigenvalue(risk)
