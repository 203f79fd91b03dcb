"""Rules for the batch size, against gradients written out one by one."""

import math

import pytest
import torch
from torch import Tensor

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.noise import (
    gradient_diversity,
    inner_product_test,
    norm_test,
    orthogonality_test,
)


def gradients(n: int = 12, size: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, size, generator=generator, dtype=torch.float64)
    return noise + torch.linspace(0.2, 1.0, size, dtype=torch.float64)


def length(vector: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def test_norm_test_is_the_standard_error_over_the_length() -> None:
    """Catches: the variance with denominator n, a forgotten root."""
    g = gradients()
    mean = g.mean(0)
    variance = sum(length(row - mean) ** 2 for row in g) / (len(g) - 1)
    expected = math.sqrt(variance / len(g)) / length(mean)
    test = norm_test(
        float(g.square().sum(1).mean()), float(mean.square().sum()), len(g), limit=0.3
    )
    assert test.statistic == pytest.approx(expected, rel=1e-12)
    assert test.batch_size == pytest.approx(variance / (0.3 * length(mean)) ** 2)
    assert test.passed is (expected <= 0.3)


@pytest.mark.parametrize("population", [None, 40])
def test_batch_of_the_size_asked_for_passes_just_so(population: int | None) -> None:
    """Catches: a size that forgets the finite population, or counts it twice."""
    variance, sq_norm, limit = 6.1, 1.0, 0.5
    n = 10

    def at(size: float) -> float:
        mean_sq = sq_norm + variance * (size - 1) / size
        test = norm_test(
            mean_sq, sq_norm, int(size), limit=limit, population_size=population
        )
        return test.statistic

    mean_sq = sq_norm + variance * (n - 1) / n
    wanted = norm_test(
        mean_sq, sq_norm, n, limit=limit, population_size=population
    ).batch_size
    assert at(math.ceil(wanted)) <= limit < at(math.floor(wanted))


def test_finite_population_is_counted_as_its_authors_do() -> None:
    """Catches: N for N - 1, which hardly shows in large populations."""
    alone = norm_test(5.0, 1.0, 4).statistic
    among_six = norm_test(5.0, 1.0, 4, population_size=6).statistic
    assert among_six**2 == pytest.approx(alone**2 * (6 - 4) / (6 - 1), rel=1e-12)


def test_whole_population_has_no_sampling_error() -> None:
    """Catches: a correction that leaves some error to a batch of everything."""
    test = norm_test(5.0, 0.1, 8, population_size=8)
    assert test.statistic == 0.0
    assert test.passed


def test_squared_statistic_is_not_a_noise_scale() -> None:
    """Catches: ``n θ²`` passed off as a noise scale: it saturates at the batch."""
    n, size = 64, 1000
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(200, n, size, generator=generator) / math.sqrt(size)
    g = noise + math.sqrt(1e-3 / size)  # true noise scale 1000
    mean_sq = g.square().sum(2).mean(1)
    sq_norm = g.mean(1).square().sum(1)
    found = [
        n * norm_test(float(s), float(q), n).statistic ** 2
        for s, q in zip(mean_sq, sq_norm, strict=True)
    ]
    assert sum(found) / len(found) < 1.1 * n


def test_inner_product_test_by_hand() -> None:
    """Catches: |g|² where |g|⁴ belongs, the denominator n."""
    g = gradients(seed=2)
    mean = g.mean(0)
    products = [float(row @ mean) for row in g]
    q = float(mean @ mean)
    variance = sum((h - q) ** 2 for h in products) / (len(g) - 1)
    test = inner_product_test(g @ mean, limit=0.4)
    assert test.statistic == pytest.approx(math.sqrt(variance / len(g)) / q, rel=1e-12)
    assert test.batch_size == pytest.approx(variance / (0.4 * q) ** 2)


def test_orthogonality_test_by_hand() -> None:
    """Catches: the residual of a projection onto the wrong vector."""
    g = gradients(seed=3)
    mean = g.mean(0)
    q = float(mean @ mean)
    across = sum(length(row - (row @ mean) / q * mean) ** 2 for row in g)
    variance = across / (len(g) - 1)
    test = orthogonality_test(g.square().sum(1), g @ mean)
    assert test.statistic == pytest.approx(math.sqrt(variance / len(g) / q), rel=1e-10)
    assert test.passed is (test.statistic <= math.tan(math.radians(80)))


def test_both_parts_make_up_the_norm_test() -> None:
    """Along and across the mean gradient, variances add up to the whole."""
    g = gradients(seed=4)
    mean = g.mean(0)
    inner, norms = g @ mean, g.square().sum(1)
    whole = norm_test(float(norms.mean()), float(mean @ mean), len(g)).statistic
    along = inner_product_test(inner).statistic
    across = orthogonality_test(norms, inner).statistic
    assert whole**2 == pytest.approx(along**2 + across**2, rel=1e-10)


def test_zero_gradient_fails_every_test() -> None:
    """Catches: 0/0 that passes, or raises in the middle of a run."""
    assert norm_test(1.0, 0.0, 4).batch_size == math.inf
    assert not norm_test(1.0, 0.0, 4).passed
    zero = torch.zeros(4)
    assert not orthogonality_test(torch.ones(4), zero).passed
    assert norm_test(0.0, 0.0, 4).passed  # no noise either


def test_diversity_of_a_finite_set_is_one_plus_its_noise_scale() -> None:
    """Catches: means where sums belong."""
    g = gradients(n=9, seed=5)
    total = g.sum(0)
    expected = float(g.square().sum() / total.square().sum())
    mean = g.mean(0)
    mean_sq, q = float(g.square().sum(1).mean()), float(mean @ mean)
    diversity = gradient_diversity(mean_sq, q, len(g))
    assert diversity == pytest.approx(expected, rel=1e-12)
    covariance_trace = float((g - mean).square().sum() / len(g))
    assert len(g) * diversity == pytest.approx(1 + covariance_trace / q, rel=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(BatchSizeError, match="needs 2 examples, got 1"):
        norm_test(1.0, 1.0, 1)
    with pytest.raises(UsageError, match="limit > 0, got -1"):
        norm_test(1.0, 1.0, 4, limit=-1)
    with pytest.raises(BatchSizeError, match="population_size of at least as many"):
        norm_test(1.0, 1.0, 4, population_size=3)
    with pytest.raises(UsageError, match="got 4 and 3"):
        orthogonality_test(torch.ones(4), torch.ones(3))
    with pytest.raises(BatchSizeError, match="needs an example, got 0"):
        gradient_diversity(1.0, 1.0, 0)
