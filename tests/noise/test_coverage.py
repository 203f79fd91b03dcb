"""Every estimator on gradients whose mean and covariance are known.

Unbiased, and 95 % intervals that cover 95 %, over 1,000 repeats of a run of steps.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from noisekit.noise import GradientMoments, ratio_of_averages

REPEATS, STEPS, BATCH, NUM_PARAMS = 1_000, 40, 16, 10
SCALES = torch.linspace(0.3, 2.0, NUM_PARAMS, dtype=torch.float64)
MEAN = torch.full((NUM_PARAMS,), 0.35, dtype=torch.float64)
TRACE, NORM = float(SCALES.square().sum()), float(MEAN.square().sum())

# 95 % of 1,000, give or take what chance does once in 1,000 such tests.
BAND = (0.95 - 3.3 * math.sqrt(0.95 * 0.05 / 1_000), 0.95 + 3.3 * 0.0069)


def gradients(*shape: int, seed: int) -> Tensor:
    """Gradients of single examples, ``(*shape, P)``."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(*shape, NUM_PARAMS, generator=generator, dtype=torch.float64)
    return MEAN + SCALES * z


def moments_of(
    units: Tensor, weights: Tensor, sizes: Tensor, num_read: int | None = None
) -> GradientMoments:
    """Moments of ``(..., K, P)`` units, one entry per leading index."""
    parts = weights[:, None] * units
    sq_norms = parts.square().sum(-1)
    weight_sq_sum = float(weights.square().sum())
    size = weight_sq_sum / float((weights.square() / sizes).sum())
    return GradientMoments(
        len(weights),
        size,
        weight_sq_sum,
        sq_norms.sum(-1),
        sq_norms.square().sum(-1),
        parts.sum(-2).square().sum(-1),
        num_read,
    )


def of_chunks(grads: Tensor, sizes: list[int]) -> GradientMoments:
    means = torch.stack([part.mean(-2) for part in grads.split(sizes, -2)], -2)
    counts = torch.tensor(sizes, dtype=torch.float64)
    return moments_of(means, counts / BATCH, counts)


def per_example(grads: Tensor) -> GradientMoments:
    ones = torch.ones(BATCH, dtype=torch.float64)
    return moments_of(grads, ones / BATCH, ones)


def rows(grads: Tensor) -> GradientMoments:
    """A quarter of the rows stands for all; the gradient is of all."""
    every, num_read = per_example(grads), BATCH // 4
    sq_norms = (grads[..., :num_read, :] / BATCH).square().sum(-1)
    return GradientMoments(
        BATCH,
        1,
        every.weight_sq_sum,
        4 * sq_norms.sum(-1),
        4 * sq_norms.square().sum(-1),
        every.grad_sq_norm,
        num_read,
    )


def random_signs(grads: Tensor) -> GradientMoments:
    generator = torch.Generator().manual_seed(9)
    signs = torch.randint(2, grads.shape[:-1], generator=generator).double() * 2 - 1
    total = (signs[..., None] * grads / BATCH).sum(-2).square().sum(-1)
    every = per_example(grads)
    fourth = (BATCH * total).square() * (1 + 2 * (BATCH - 1)) / BATCH**3
    return GradientMoments(
        BATCH, 1, every.weight_sq_sum, total, fourth, every.grad_sq_norm
    )


ESTIMATORS: dict[str, Callable[[Tensor], GradientMoments]] = {
    "per_example": per_example,
    "rows": rows,
    "chunks": lambda grads: of_chunks(grads, [4, 4, 4, 4]),
    "unequal_chunks": lambda grads: of_chunks(grads, [2, 3, 5, 6]),
    "two_micro_batches": lambda grads: of_chunks(grads, [8, 8]),
    "random_signs": random_signs,
}


@pytest.fixture(scope="module")
def runs() -> Tensor:
    """Gradients of all repeats, ``(repeats, steps, batch, P)``."""
    return gradients(REPEATS, STEPS, BATCH, seed=1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_unbiased(runs: Tensor, name: str) -> None:
    """Means over 40,000 steps lie within 4 standard errors of the truth.

    Catches: chunks of one size supposed; rows counted as all; a clamp at zero; K in
    place of K - 1.
    """
    found = ESTIMATORS[name](runs).trace_and_norm()
    for values, truth in zip(found, (TRACE, NORM), strict=True):
        error = float(values.std()) / math.sqrt(values.numel())
        assert abs(float(values.mean()) - truth) < 4 * error
    assert float(found[1].min()) < 0  # negative ones belong to the mean


@pytest.mark.parametrize("name", ESTIMATORS)
def test_intervals_over_steps_cover(runs: Tensor, name: str) -> None:
    """Of both parts, and Fieller's of the noise scale.

    Catches: errors from the steps' own spread squared once too often; a normal
    quantile for 20 blocks; a ratio averaged over steps; negative norms dropped.
    """
    traces, norms = ESTIMATORS[name](runs).trace_and_norm()
    truth = {
        "variance_trace": TRACE,
        "debiased_grad_sq_norm": NORM,
        "simple_noise_scale": TRACE / NORM,
    }
    covered = dict.fromkeys(truth, 0)
    for trace, norm in zip(traces, norms, strict=True):
        noise = ratio_of_averages(trace, norm)
        for quantity, value in truth.items():
            covered[quantity] += getattr(noise, quantity).interval().contains(value)
    for quantity, count in covered.items():
        assert BAND[0] < count / REPEATS < BAND[1], quantity


@pytest.mark.parametrize("name", ESTIMATORS)
def test_intervals_of_one_step_cover_at_least(name: str) -> None:
    """Norms alone do not tell how noise is spread: those errors are bounds.

    Catches: the spread of all units where a subset was read; a normal quantile for
    four chunks; the chance of the signs left out.
    """
    whole = ESTIMATORS[name](gradients(REPEATS, BATCH, seed=2))
    truth = {
        "variance_trace": TRACE,
        "debiased_grad_sq_norm": NORM,
        "simple_noise_scale": TRACE / NORM,
    }
    covered = dict.fromkeys(truth, 0)
    for index in range(REPEATS):
        noise = whole.layer(index).finalise()
        assert noise is not None
        for quantity, value in truth.items():
            covered[quantity] += getattr(noise, quantity).interval().contains(value)
    assert all(count / REPEATS > BAND[0] for count in covered.values()), covered


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_replacement_the_population_s_own_gradient_is_found(name: str) -> None:
    """Batches of 16 out of 40 examples.

    Catches: the infinite-population form, low by ``tr Σ / N``, in any estimator.
    """
    population = gradients(40, seed=3)
    generator = torch.Generator().manual_seed(4)
    draws = torch.rand(8_000, 40, generator=generator).argsort(1)[:, :BATCH]
    found = ESTIMATORS[name](population[draws])
    trace, norm = found.trace_and_norm(population_size=40)
    centred = population - population.mean(0)
    truth = (
        float(centred.square().sum()) / 39,
        float(population.mean(0).square().sum()),
    )
    for values, expected in zip((trace, norm), truth, strict=True):
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - expected) < 4 * error
    naive = found.trace_and_norm()[1]
    error = float(naive.std()) / math.sqrt(len(naive))
    assert float(naive.mean()) + 2 * error < truth[1]
