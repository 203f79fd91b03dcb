"""Second derivatives that autograd takes wrongly, without raising.

Each wrong model has a twin in plain operations, whose dense Hessian in double
precision shows what the product should have been.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import (
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
)
from noisekit.curvature.operators.derivative_check import relative_gap
from noisekit.sharpness import batch_sharpness, fisher_rao_norm, lambda_max
from tests.reference import sharpness as reference

LOSS = nn.CrossEntropyLoss()
Operator = Callable[..., HessianOperator]


class SavedGradient(torch.autograd.Function):
    """Cross-entropy whose forward pass makes the gradient, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        chances = logits.softmax(1)
        rows = torch.arange(len(targets))
        slope = chances.clone()
        slope[rows, targets] -= 1
        ctx.save_for_backward(slope / len(targets))
        return -chances[rows, targets].log().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


class HiddenBackward(torch.autograd.Function):
    """A cube whose backward pass runs where autograd does not look, as kernels do."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        with torch.no_grad():
            return 3 * inputs**2 * grad


class StaleIntermediate(torch.autograd.Function):
    """A cube that keeps its derivative on ``ctx``, a constant to a second backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.slope = 3 * inputs**2
        return inputs**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.slope * grad


class RightBackward(torch.autograd.Function):
    """A cube whose backward pass can be differentiated."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return 3 * inputs**2 * grad


class Gated(nn.Module):
    """A hidden layer behind a function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.function(torch.tanh(self.first(inputs))))


def fused(outputs: Tensor, targets: Tensor) -> Tensor:
    return SavedGradient.apply(outputs, targets)


def data(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (20,), generator=generator)
    return [
        (inputs[:13].to(dtype), targets[:13]),
        (inputs[13:].to(dtype), targets[13:]),
    ]


def half_hidden(hidden: Tensor) -> Tensor:
    return hidden * hidden.detach().sigmoid()


@pytest.mark.parametrize("function", [HiddenBackward.apply, half_hidden])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "measured",
    [
        lambda *given: HessianOperator(*given).to_dense(),
        lambda *given: HessianOperator(*given, memory_budget=1).to_dense(),
        lambda *given: HessianOperator(*given, form="forward_over_reverse").to_dense(),
        lambda_max,
    ],
    ids=["kept", "rebuilt", "forward", "lambda_max"],
)
def test_hessians_without_a_part_are_refused(
    measured: Callable[..., object], function: Any, dtype: torch.dtype
) -> None:
    """Catches: a value returned although autograd left out what it could not see."""
    with pytest.raises(UsageError, match="needs autograd to differentiate its own"):
        measured(Gated(function).to(dtype), LOSS, data(dtype))


@pytest.mark.parametrize("function", [HiddenBackward.apply])
@pytest.mark.parametrize(
    "operator", [GGNOperator, FisherOperator, GradientCovarianceOperator]
)
def test_jacobians_without_a_part_are_refused(operator: Any, function: Any) -> None:
    """Catches: a check of the Hessian's products alone; one that refuses only once."""
    matrix = operator(Gated(function), LOSS, data())
    for _ in range(2):
        with pytest.raises(UsageError, match="function HiddenBackward hides a part"):
            matrix @ torch.ones(matrix.shape[0])


def test_saved_derivatives_are_wrong_in_hessians_and_right_in_jacobians() -> None:
    """``J v`` differentiates in the cotangent alone, in which a stale slope is right.

    Catches: a Gauss-Newton matrix that is refused although it is exact.
    """
    stale, plain = Gated(StaleIntermediate.apply), Gated(lambda hidden: hidden**3)
    with pytest.raises(UsageError, match="custom function StaleIntermediate hides"):
        HessianOperator(stale, LOSS, data()).to_dense()
    got = GGNOperator(stale, LOSS, data()).to_dense()
    want = GGNOperator(plain, LOSS, data()).to_dense()
    torch.testing.assert_close(got, want)


def test_a_fused_loss_is_refused_by_every_operator_that_curves_it() -> None:
    """Only the Fisher matrix does not differentiate the loss twice.

    Catches: a check of the model without its loss; a Gauss-Newton matrix of zeros.
    """
    model = Gated(torch.relu)
    with pytest.raises(UsageError, match="SavedGradient hides a part of it, such as"):
        HessianOperator(model, fused, data()).to_dense()
    with pytest.raises(UsageError, match="SavedGradient hides a part of it, such as"):
        GGNOperator(model, fused, data()).to_dense()
    got = FisherOperator(model, fused, data(), likelihood="categorical").to_dense()
    want = FisherOperator(model, LOSS, data()).to_dense()
    torch.testing.assert_close(got, want)


def test_the_way_out_is_right() -> None:
    """Differences of gradients give the Hessian of the plain twin.

    Catches: advice that leads to another refusal, or to another matrix.
    """
    model = Gated(HiddenBackward.apply)
    got = HessianOperator(model, fused, data(), form="finite_difference").to_dense()
    twin = Gated(lambda hidden: hidden**3).double()
    inputs, targets = (
        torch.cat(parts) for parts in zip(*data(torch.float64), strict=True)
    )
    loss = reference.flat_loss(twin, LOSS, inputs, targets)
    want = reference.dense_hessian(loss, reference.flat_weights(twin))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_measures_with_derivatives_of_their_own_are_checked() -> None:
    """Catches: second derivatives taken beside the operators, unchecked."""
    model = Gated(HiddenBackward.apply)
    with pytest.raises(UsageError, match="needs autograd to differentiate its own"):
        batch_sharpness(model, LOSS, data())
    with pytest.raises(UsageError, match="needs autograd to differentiate its own"):
        fisher_rao_norm(model, LOSS, data())


class ComputesInSingle(nn.Module):
    """Casts to float32 inside, so that tiny moves in double precision are lost."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.linear(
            inputs.float(), self.first.weight.float(), self.first.bias.float()
        )
        last = self.last.weight.float(), self.last.bias.float()
        return functional.linear(torch.relu(hidden), *last)


def zero_head() -> nn.Module:
    """Return a network whose ReLUs all stand exactly at their kink."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    return model


def saturated() -> nn.Module:
    """Return a network whose gradients are mostly rounding, at a loss of nearly 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        sum(LOSS(model(x), y) for x, y in data()).backward()
        optimizer.step()
    with torch.no_grad():
        model[2].weight.mul_(4)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gated(RightBackward.apply),
        lambda: Gated(torch.relu),
        lambda: Gated(torch.sign),
        lambda: Gated(torch.relu).bfloat16(),
        ComputesInSingle,
        zero_head,
        saturated,
    ],
    ids=["custom", "relu", "sign", "bfloat16", "casts", "kinks", "saturated"],
)
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, FisherOperator])
def test_right_models_are_never_refused(build: Any, operator: Any) -> None:
    """Catches: rounding or a kink taken for a part that is missing."""
    model = build()
    batches = data(next(model.parameters()).dtype)
    matrix = operator(model, LOSS, batches)
    assert bool((matrix @ torch.ones(matrix.shape[0])).isfinite().all())


def test_the_check_runs_once_for_each_risk_and_loss() -> None:
    """Catches: eight gradients at every operator; a loss exchanged behind a check."""
    calls: list[int] = []

    class Counting(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            calls.append(len(inputs))
            return super().forward(inputs)

    torch.manual_seed(0)
    risk = EmpiricalRisk(Counting(4, 3), LOSS, data())
    vector = torch.ones(15)
    costs = []
    for _ in range(2):
        calls.clear()
        HessianOperator(risk, form="rebuilt") @ vector
        costs.append(calls.copy())
    assert costs[1] == [13, 7]
    assert costs[0] == [8, 8, 8, 13, 7]
    with pytest.raises(UsageError, match="SavedGradient"):
        HessianOperator(risk.with_loss(fused)) @ vector


def test_differences_that_do_not_settle_prove_nothing() -> None:
    """A jump gives differences that grow as the step shrinks.

    Catches: a mismatch at a single step taken for proof.
    """
    one = torch.ones(1)
    steps = (1e-2, 1e-3)
    assert relative_gap(one, lambda x: torch.tensor([float(x > 0)]), steps) == 0.0
    assert relative_gap(one, lambda x: torch.tensor([3 * x]), steps) > 0.5
    assert relative_gap(one, lambda x: torch.tensor([x]), steps) == 0.0
    assert relative_gap(one, lambda x: torch.tensor([0.0]), steps) == 0.0
