"""Measures on every model and loss of the case table, against one big expression."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.data_error import curvature_parts
from noisekit.sharpness.measures.average import average_sharpness
from noisekit.sharpness.measures.batch import batch_sharpness
from noisekit.sharpness.measures.worst_case import worst_case_sharpness
from tests.cases import CASES, Case
from tests.randomness import seeded
from tests.reference import curvature as reference


def risk_of(case: Case) -> EmpiricalRisk:
    return EmpiricalRisk(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )


def loss_at(case: Case, displacement: torch.Tensor) -> float:
    """The loss with all trainable weights displaced, in one expression."""
    model: nn.Module = copy.deepcopy(case.build()).eval()
    start = 0
    with torch.no_grad():
        for parameter in reference.trainable(model):
            stop = start + parameter.numel()
            parameter.add_(displacement[start:stop].view_as(parameter))
            start = stop
        return float(
            reference.total_loss(
                model,
                case.loss_fn,
                case.batches,
                counts=case.counts,
                reduction=case.reduction,
            )
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_is_the_rise_of_the_whole_loss(case: Case) -> None:
    """Gradient and rise are those of all batches, weighted by what counts.

    Catches: batches that weigh the same; ignored tokens and class weights left out.
    """
    gradient, _ = case.gradient_and_hessian()
    step = torch.from_numpy(0.05 * gradient / np.linalg.norm(gradient))
    want = loss_at(case, step) - loss_at(case, 0 * step)
    got = worst_case_sharpness(risk_of(case), rho=0.05)
    assert got.value == pytest.approx(want, rel=1e-8)
    torch.testing.assert_close(got.displacement, step, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_noise_and_curvature_are_of_the_whole_loss(case: Case) -> None:
    """Small noise rises by its own quadratic form, and batches' parts add up.

    Catches: a rise of batch averages; curvature of one batch.
    """
    gradient, hessian = case.gradient_and_hessian()
    risk = risk_of(case)
    got = average_sharpness(risk, sigma=1e-4, num_draws=2, generator=seeded())
    generator, rises = seeded(), []
    for _ in range(2):
        noise = 1e-4 * torch.randn(len(gradient), generator=generator).numpy()
        rises.append(noise @ hessian @ noise / 2)
    assert got.value == pytest.approx(np.mean(rises), rel=1e-3, abs=1e-14)
    vector = torch.randn(len(gradient), generator=seeded(1)).double()
    parts = curvature_parts(risk, vector)
    want = vector.numpy() @ hessian @ vector.numpy()
    assert float(parts.sum()) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_sharpness_is_of_each_batch_s_mean_loss(case: Case) -> None:
    """That of a sum loss is divided by the batch's examples, as in all other measures.

    Catches: batch sharpness of the sum beside an eigenvalue of the mean.
    """
    size = len(case.batches[0][1])
    alike = [batch for batch in case.batches if len(batch[1]) == size]
    ratios = []
    for batch in alike:
        gradient, hessian = reference.gradient_and_hessian(
            case.build(), case.loss_fn, [batch], counts=(1.0,), reduction="sum"
        )
        ratio = gradient @ hessian @ gradient / (gradient @ gradient)
        ratios.append(ratio / size if case.reduction == "sum" else ratio)
    got = batch_sharpness(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    np.testing.assert_allclose(got.ratios, ratios, rtol=1e-8)
    assert got.num_left_out == len(case.batches) - len(alike)
