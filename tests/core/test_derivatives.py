"""Derivatives of the risk where they are not what autograd returns by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

import noisekit as nk
from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from tests.cases import CASES, RAGGED, Case, PartlyUsedNetwork, mlp, seeded

LOSS = nn.CrossEntropyLoss()


class ComplexNetwork(nn.Module):
    """Complex weights between real ones, an odd number of them before."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(3))
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.cfloat))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return moduli."""
        product = inputs.to(self.weight.dtype) @ self.weight
        return self.scale * (product + self.offset).abs()


def complex_network() -> ComplexNetwork:
    torch.manual_seed(0)
    model = ComplexNetwork()
    model.weight.data = model.weight.data.to(torch.cdouble)
    model.offset.data, model.scale.data = model.offset.double(), model.scale.double()
    return model


def real_function(vector: Tensor) -> Tensor:
    """The same network as a function of real numbers, over all data."""
    offset, pairs, scale = vector[:3], vector[3:27].view(4, 3, 2), vector[27]
    total = vector.new_zeros(())
    for inputs, targets in RAGGED:
        real = inputs @ pairs[..., 0] + offset
        modulus = (real.square() + (inputs @ pairs[..., 1]).square()).sqrt()
        loss = functional.cross_entropy(scale * modulus, targets, reduction="sum")
        total = total + loss / 10
    return total


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    """Value, gradient and every column of the Hessian.

    Catches: imaginary parts dropped from the flat vector, or their sign lost.
    """
    model = complex_network()
    risk = EmpiricalRisk(model, LOSS, RAGGED)
    vector = risk.vector()
    assert vector.dtype == torch.float64
    assert vector.shape == (28,)
    value, gradient = risk.value_and_grad()
    assert value == pytest.approx(float(real_function(vector)), rel=1e-12)
    want = torch.autograd.functional.jacobian(real_function, vector)
    assert_close(gradient, want, rtol=1e-10, atol=1e-13)
    moved = vector + torch.linspace(-0.1, 0.1, 28).double()
    assert risk.value(moved) == pytest.approx(float(real_function(moved)), rel=1e-12)
    hessian = nk.HessianOperator(model, LOSS, RAGGED).to_dense()
    want = torch.autograd.functional.hessian(real_function, vector)
    assert_close(hessian, want, rtol=1e-9, atol=1e-12)


def test_complex_parameters_in_a_wider_type() -> None:
    """Catches: real parameters widened, complex ones left as they are."""
    model = complex_network()
    model.weight.data = model.weight.data.to(torch.cfloat)
    risk = EmpiricalRisk(model, LOSS, RAGGED).in_precision(torch.float64)
    with risk.evaluating():
        assert model.weight.dtype == torch.cdouble
    assert model.weight.dtype == torch.cfloat
    assert risk.value() == pytest.approx(float(real_function(risk.vector())), rel=1e-12)


class WithoutGraph(nn.Module):
    """Runs its body without a graph."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.whole = whole

    def forward(self, inputs: Tensor) -> Tensor:
        """Cut behind the body, or behind everything."""
        with torch.no_grad():
            features = torch.tanh(self.body(inputs))
            outputs = self.head(features)
        return outputs if self.whole else self.head(features)


def error_rate(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) != targets).double().mean()


CUT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "detached": (mlp, lambda o, t: LOSS(o, t).detach(), "0.weight, 0.bias, 3.weight"),
    "item": (mlp, lambda o, t: LOSS(o.detach(), t).clone(), "0.weight"),
    "error rate": (mlp, error_rate, "0.weight, 0.bias, 3.weight, 3.bias"),
    "no_grad": (
        lambda: WithoutGraph(True),
        LOSS,
        "body.weight, body.bias, head",
    ),
    "part": (
        lambda: WithoutGraph(False),
        LOSS,
        "depends on body.weight, body.bias",
    ),
}


@pytest.mark.parametrize("where", CUT)
def test_a_loss_cut_from_its_parameters_is_refused(where: str) -> None:
    """By the gradient, the Hessian and the Gauss-Newton matrix; its value is not.

    Catches: a curvature of 0, which is what autograd makes of a cut; a refusal that
    a second call of the same risk forgets.
    """
    build, loss, names = CUT[where]
    model = seeded(build)()
    assert EmpiricalRisk(model, loss, RAGGED).value() > 0.0
    risk = EmpiricalRisk(model, loss, RAGGED)
    calls: list[Callable[[], object]] = [
        risk.value_and_grad,
        risk.value_and_grad,
        lambda: nk.lambda_max(model, loss, RAGGED),
        lambda: nk.GGNOperator(model, loss, RAGGED) @ torch.ones(43),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=names):
            call()


def test_the_refusal_of_a_cut_says_what_to_do() -> None:
    model = seeded(lambda: WithoutGraph(False))()
    with pytest.raises(UsageError) as caught:
        EmpiricalRisk(model, LOSS, RAGGED).value_and_grad()
    assert str(caught.value) == (
        "a derivative needs a loss that autograd can follow back to the parameters, "
        "got one that depends on body.weight, body.bias but is cut off from them by "
        "detach(), .item(), torch.no_grad() or a count such as the error rate; remove "
        "the cut, leave those parameters out with params=, or set "
        "requires_grad_(False) on them. Functions that need no derivative take such a "
        "loss."
    )
    assert nk.lambda_max(model, LOSS, RAGGED, params="head.*").value > 0.0
    model.body.requires_grad_(False)
    assert nk.lambda_max(model, LOSS, RAGGED).value > 0.0


def test_parameters_that_nothing_uses_have_a_zero_gradient() -> None:
    """Also where they are all that is measured.

    Catches: unused parameters taken for ones behind a cut.
    """
    model = seeded(PartlyUsedNetwork)()
    for params in (None, "unused.*"):
        risk = EmpiricalRisk(model, LOSS, RAGGED, params=params)
        gradient = risk.value_and_grad()[1]
        part = gradient[: 10 if params is None else None]
        assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_ordinary_model_is_taken_for_a_cut_one(case: Case) -> None:
    """Catches: graphs whose leaves are not found, as of recurrent layers."""
    risk = EmpiricalRisk(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    assert risk.value_and_grad()[1].isfinite().all()
