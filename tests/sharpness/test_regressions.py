"""Measures of linear and logistic regression, whose derivatives can be written down."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.measures.average import average_sharpness
from noisekit.sharpness.measures.batch import batch_sharpness
from noisekit.sharpness.measures.eigenvalues import lambda_max
from noisekit.sharpness.measures.epsilon import epsilon_sharpness
from noisekit.sharpness.measures.fisher_rao import fisher_rao_norm
from noisekit.sharpness.measures.pac_bayes import (
    pac_bayes_flatness,
    pac_bayes_sharpness,
)
from noisekit.sharpness.measures.traces import hessian_trace
from noisekit.sharpness.measures.worst_case import (
    worst_case_sharpness,
)
from tests.processes import run_in_processes
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, classes, rectified

WEIGHTS = torch.tensor([1.5, -1.0, 0.5]).double()
HALF = nn.MSELoss()


def inputs_of(num_examples: int) -> Tensor:
    return torch.randn(num_examples, 3, generator=seeded(4)).double()


def linear() -> nn.Linear:
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(WEIGHTS[None])
    return model


class Logistic(nn.Module):
    """Two classes by one row of weights: the other's logit is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(WEIGHTS.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        score = inputs @ self.weights
        return torch.stack([score, torch.zeros_like(score)], 1)


def in_batches(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split([7, 13, 20]), targets.split([7, 13, 20]), strict=True))


def test_linear_regression_is_a_quadratic_everywhere() -> None:
    """``H = 2 X'X / n``: its eigenvalue, its ball, its box and its noise.

    Catches: a Hessian without the loss's factor of two.
    """
    inputs = inputs_of(40)
    targets = inputs @ torch.tensor([[1.0], [-1.2], 0.9 * torch.ones(1)]).double()
    data = in_batches(inputs, targets)
    hessian = 2 * inputs.T @ inputs / 40
    residuals = inputs @ WEIGHTS - targets[:, 0]
    gradient = 2 * inputs.T @ residuals / 40
    loss = float(residuals.square().mean())

    top = lambda_max(linear(), HALF, data, tol=1e-6, generator=seeded())
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]))

    ball = worst_case_sharpness(linear(), HALF, data, rho=0.3, steps=30)
    want = reference.highest_in_ball(gradient.numpy(), hessian.numpy(), 0.3)
    assert ball.value == pytest.approx(want, rel=1e-7)

    box = epsilon_sharpness(linear(), HALF, data, epsilon=0.1, restarts=4)
    rises = [
        float(gradient @ step + step @ hessian @ step / 2)
        for step in reference.corners(0.1 * (WEIGHTS.abs() + 1))
    ]
    assert box.value == pytest.approx(reference.keskar(max(rises), loss), rel=1e-9)

    noise = pac_bayes_flatness(
        linear(), HALF, data, criterion="loss", num_draws=200, generator=seeded()
    )
    want = float(hessian.trace()) / (2 * 0.1)
    assert abs(noise.value - want) < 4 * noise.estimate.stderr

    worst = pac_bayes_sharpness(
        linear(), HALF, data, criterion="loss", restarts=4, tol=1e-3, generator=seeded()
    )
    rise = max(
        float(gradient @ step + step @ hessian @ step / 2)
        for step in reference.corners(torch.full((3,), worst.radius).double())
    )
    assert rise == pytest.approx(0.1, rel=2e-3)


def test_logistic_regression_has_its_chances_as_weights() -> None:
    """``H = mean p (1 - p) x x'``: eigenvalue, Fisher-Rao norm, batch sharpness.

    Catches: the observed labels in the Fisher matrix; the Hessian of all data along
    the gradient of a batch.
    """
    inputs = inputs_of(40)
    targets = torch.randint(2, (40,), generator=seeded(2))
    data = in_batches(inputs, targets)

    def curvature(rows: Tensor) -> Tensor:
        chances = (rows @ WEIGHTS).sigmoid()
        return (rows * (chances * (1 - chances))[:, None]).T @ rows / len(rows)

    hessian = curvature(inputs)
    top = lambda_max(Logistic(), LOSS, data, tol=1e-6, generator=seeded())
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]))
    norm = fisher_rao_norm(Logistic(), LOSS, data)
    assert norm.value == pytest.approx(float(WEIGHTS @ hessian @ WEIGHTS), rel=1e-10)

    ratios = []
    for start in range(0, 40, 10):
        rows, own = inputs[start : start + 10], targets[start : start + 10]
        chances = (rows @ WEIGHTS).sigmoid()
        gradient = rows.T @ (chances - (own == 0).double()) / 10
        along = gradient @ curvature(rows) @ gradient
        ratios.append(float(along / gradient.square().sum()))
    batches = list(zip(inputs.split(10), targets.split(10), strict=True))
    got = batch_sharpness(Logistic(), LOSS, batches)
    np.testing.assert_allclose(got.ratios, ratios, rtol=1e-9)


def share_of(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """One process's share of the data, in batches of 4 and a ragged last one."""
    inputs, targets = (part[rank::world_size] for part in classes(31))
    return list(zip(inputs.split(4), targets.split(4), strict=True))


def spread_over(rank: int, world_size: int) -> dict[str, list[float]]:
    """What one process finds that holds its share of the data."""
    model = DistributedDataParallel(rectified())
    return measured(EmpiricalRisk(model, LOSS, share_of(rank, world_size)))


def measured(risk: EmpiricalRisk) -> dict[str, list[float]]:
    """Values of every measure, with their errors over the batches."""
    box = epsilon_sharpness(risk, generator=seeded())
    ball = worst_case_sharpness(risk, steps=3, generator=seeded())
    groups = worst_case_sharpness(risk, batch_size=2, generator=seeded())
    noise = average_sharpness(risk, sigma=0.1, num_draws=3, generator=seeded())
    top = lambda_max(risk, tol=1e-6, generator=seeded(), data_error=True)
    trace = hessian_trace(risk, num_matvecs=9, generator=seeded(), data_error=True)
    fisher = fisher_rao_norm(risk)
    plain, few = (
        batch_sharpness(risk, num_batches=number, generator=seeded())
        for number in (None, 5)
    )
    flat = pac_bayes_flatness(
        risk, num_draws=3, target=0.05, criterion="loss", generator=seeded()
    )
    numbers = {
        "box": [box.value, box.data_stderr],
        "ball": [ball.value, ball.data_stderr],
        "groups": [groups.value, groups.estimate.stderr, groups.loss, groups.grad_norm],
        "noise": [noise.value, noise.data_stderr],
        "top": [top.value, top.stderr],
        "trace": [trace.value, trace.stderr],
        "fisher": [fisher.value, fisher.stderr],
        "batches": [*plain.ratios.tolist(), plain.num_left_out, plain.value],
        "few": [*few.ratios.tolist(), few.ratio_of_means.stderr],
        "flat": [flat.value, flat.data_stderr],
    }
    return {
        name: [math.nan if x is None else float(x) for x in row]
        for name, row in numbers.items()
    }


def test_data_in_several_processes_give_the_same_values() -> None:
    """Each holds its share; values and errors are those of all data in one place.

    Catches: the loss of this process's own share, perturbed where the others are;
    errors and averages over this process's batches only; the first batches of each
    process in place of the first of all.
    """
    data = [batch for rank in range(2) for batch in share_of(rank, 2)]
    alone = measured(EmpiricalRisk(rectified(), LOSS, data))
    assert len(alone["batches"]) == 7 + 2
    assert len(alone["few"]) == 5 + 1
    for found in run_in_processes(spread_over, 2):
        for name, row in alone.items():
            assert all(map(math.isfinite, row)), name
            np.testing.assert_allclose(found[name], row, rtol=1e-6, err_msg=name)
