"""Intervals of 95 % hold the truth about 95 times in a hundred, over data and probes.

Linear regression on normal inputs has the inputs' covariance as its Hessian, so that
the truth for other data can be written down.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.data_error import data_stderr, over_data
from noisekit.sharpness.measurement import Measure, MeasurementContext
from noisekit.sharpness.measures.eigenvalues import lambda_min
from noisekit.sharpness.measures.gradient import gradient_errors
from noisekit.sharpness.measures.pac_bayes import pac_bayes_flatness
from noisekit.sharpness.measures.relative_flatness import relative_flatness
from noisekit.sharpness.measures.spectral_norms import (
    EffectiveDimension,
    HessianFrobeniusNorm,
    effective_dimension,
    hessian_frobenius_norm,
)
from noisekit.sharpness.measures.traces import (
    hessian_trace,
    weighted_hessian_trace,
)
from noisekit.sharpness.measures.worst_case import worst_case_sharpness
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, classes, rectified

SPREAD = torch.tensor([3.0, 1.5, 1.0, 0.5]).double()
WEIGHTS = torch.tensor([0.3, -1.0, 0.7, 2.0]).double()
SIZES = [30, 50] * 3


def linear() -> nn.Linear:
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(WEIGHTS[None])
    return model


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2


def regression(
    generator: torch.Generator, offset: float = 0.0, sizes: list[int] = SIZES
) -> EmpiricalRisk:
    """Random data in unequal batches; the best weights are off by ``offset``."""
    inputs = torch.randn(sum(sizes), 4, generator=generator).double() * SPREAD
    targets = inputs @ (WEIGHTS - offset)[:, None]
    batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    return EmpiricalRisk(linear(), half_squares, batches, check=False)


def layered() -> tuple[nn.Sequential, EmpiricalRisk]:
    model = rectified()
    return model, EmpiricalRisk(model, LOSS, [classes(30)])


def coverage(
    estimate: Callable[[torch.Generator], Estimate], truth: float, num_trials: int
) -> float:
    """How often the interval of 95 % has the truth in it."""
    generator = seeded(11)
    hits = [estimate(generator).interval().contains(truth) for _ in range(num_trials)]
    return float(np.mean(hits))


def _flatness(risk: EmpiricalRisk, generator: torch.Generator) -> Estimate:
    found = relative_flatness(risk, num_matvecs=8, generator=generator, data_error=True)
    return found["weight"]


def _noise(risk: EmpiricalRisk, generator: torch.Generator) -> Estimate:
    found = pac_bayes_flatness(
        risk, criterion="loss", tol=0.1, num_draws=16, generator=generator
    )
    return over_data(found.estimate, found.data_stderr, risk)


SQUARES = SPREAD.square()
SUMS: dict[str, tuple[Callable[..., Estimate], float]] = {
    "trace": (
        lambda risk, generator: hessian_trace(
            risk, num_matvecs=9, generator=generator, data_error=True
        ),
        float(SQUARES.sum()),
    ),
    "weighted_trace": (
        lambda risk, generator: weighted_hessian_trace(
            risk, num_matvecs=8, generator=generator, data_error=True
        ),
        float(SQUARES @ WEIGHTS.square()),
    ),
    "frobenius_norm": (
        lambda risk, generator: hessian_frobenius_norm(
            risk, num_matvecs=12, generator=generator, data_error=True
        ),
        float(SQUARES.norm()),
    ),
    "relative_flatness": (
        _flatness,
        float(WEIGHTS.square().sum() * SQUARES.sum()),
    ),
    "effective_dimension": (
        lambda risk, generator: effective_dimension(
            risk,
            shift=2.0,
            num_probes=8,
            num_steps=4,
            generator=generator,
            data_error=True,
        ),
        float((SQUARES / (SQUARES + 2)).sum()),
    ),
    "lambda_min": (
        lambda risk, generator: lambda_min(risk, generator=generator, data_error=True),
        0.25,
    ),
    "pac_bayes_flatness": (_noise, float(SQUARES.sum()) / 0.2),
}


NUM_TRIALS = {"effective_dimension": 80, "pac_bayes_flatness": 80}
"""Of those that take many passes; else 150."""


@pytest.mark.parametrize("name", SUMS)
def test_intervals_over_data_and_probes(name: str) -> None:
    """Other data and other probes together.

    Catches: the error over probes alone; batches of unequal size that count alike;
    products that look for directions taken for probes.
    """
    measured, truth = SUMS[name]
    share = coverage(
        lambda generator: measured(regression(generator), generator),
        truth,
        NUM_TRIALS.get(name, 150),
    )
    assert 0.90 <= share <= 0.995, share


def test_errors_over_data_are_those_of_the_derivatives() -> None:
    """Of the Frobenius norm and the dimension by their derivatives, by dense matrices.

    Catches: a shift or a norm that is forgotten; a factor of two; the inverse in
    place of its square.
    """
    risk = regression(seeded(2))
    shares = torch.tensor(SIZES).double() / sum(SIZES)
    blocks = [x.T @ x / len(x) for x, _ in risk.batches]
    whole = sum(c * block for c, block in zip(shares, blocks, strict=True))
    shifted = torch.linalg.inv(whole + 2 * torch.eye(4).double())

    def stderr(derivative: Tensor) -> float:
        along = torch.stack([(derivative * block).sum() for block in blocks])
        found = data_stderr(shares * along, shares)
        assert found is not None
        return found

    def measured(measure: Measure) -> float | None:
        with MeasurementContext(risk, stream=lambda *_: seeded(3)) as context:
            (found,) = measure.measure(context)
        return found.data_stderr

    got = measured(HessianFrobeniusNorm(num_matvecs=320))
    assert got == pytest.approx(stderr(whole / whole.norm()), rel=0.05)
    got = measured(EffectiveDimension(shift=2.0, num_probes=80, num_steps=4))
    assert got == pytest.approx(stderr(2 * shifted @ shifted), rel=0.05)


def test_interval_of_the_gradient_norm() -> None:
    """Off the minimizer by the same in each weight, ``|g|`` is that of the variances.

    Catches: the norm's error taken for that of the whole vector, which is larger.
    """

    def measured(generator: torch.Generator) -> Estimate:
        risk = regression(generator, offset=0.5)
        gradient = risk.value_and_grad()[1]
        stderr, share = gradient_errors(risk, gradient)
        assert share is not None
        assert 0 < share < 0.2
        return over_data(Estimate(float(gradient.norm())), stderr, risk)

    share = coverage(measured, 0.5 * float(SQUARES.norm()), 300)
    assert 0.90 <= share <= 0.99


def test_noise_in_the_gradient_is_told() -> None:
    """Where the true gradient is zero, its square is all noise: a share about one.

    Catches: a variance over the batches that is not that of their mean.
    """
    shares = []
    for seed in range(200):
        generator = seeded(seed)
        inputs = torch.randn(240, 4, generator=generator).double()
        noise = torch.randn(240, 1, generator=generator).double()
        targets = inputs @ WEIGHTS[:, None] + noise
        batches = list(zip(inputs.split(SIZES), targets.split(SIZES), strict=True))
        risk = EmpiricalRisk(linear(), half_squares, batches, check=False)
        gradient = risk.value_and_grad()[1]
        share = gradient_errors(risk, gradient)[1]
        assert share is not None
        shares.append(share * float(gradient.square().sum()))
    # n E|g|² is the trace of the covariance of one example's gradient, which is 4.
    assert np.mean(shares) * 240 == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_interval_of_worst_case_sharpness(batch_size: int | None) -> None:
    """Over other data: of the whole by its batches, and of the mean over groups.

    Catches: the spread over groups in place of the error of their mean.
    """

    def measured(risk: EmpiricalRisk) -> tuple[float, float, float]:
        found = worst_case_sharpness(
            risk, rho=0.2, steps=1 if batch_size else 8, batch_size=batch_size
        )
        if batch_size is None:
            assert found.data_stderr is not None
            return found.value, found.data_stderr, len(SIZES) - 1
        assert found.estimate.stderr is not None
        assert found.estimate.dof is not None
        return found.value, found.estimate.stderr, found.estimate.dof

    truth = 0.2**2 * 9 / 2
    if batch_size is not None:
        truth = measured(regression(seeded(3), offset=0.1, sizes=[5] * 1500))[0]
    generator, hits = seeded(4), 0
    for _ in range(100):
        offset, sizes = (0.0, SIZES) if batch_size is None else (0.1, [20] * 5)
        value, stderr, dof = measured(regression(generator, offset, sizes))
        hits += abs(value - truth) <= stats.t.ppf(0.975, dof) * stderr
    assert 0.90 <= hits / 100 <= 0.99


def test_interval_of_relative_flatness_over_probes() -> None:
    """Other probes on the same data, for a layer of several rows.

    Catches: the spread of probes in place of the error of their mean.
    """
    model, risk = layered()
    hessian = reference.dense_hessian(
        reference.flat_loss(model, LOSS, *classes(30)), reference.flat_weights(model)
    )
    want = reference.relative_flatness_of_matrix(
        model[2].weight.detach(), hessian[36:54, 36:54]
    )
    share = coverage(
        lambda generator: relative_flatness(risk, num_matvecs=24, generator=generator)[
            "2.weight"
        ],
        want,
        150,
    )
    assert 0.90 <= share <= 0.985
