"""Quantities parameter by parameter, against loops and known Gaussian gradients."""

import math

import pytest
import torch
from torch import Tensor

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.noise import (
    ElementMoments,
    cabs_batch_size,
    evidence_stopping,
    gradient_signal_to_noise,
)


def moments_of(gradients: Tensor) -> ElementMoments:
    return ElementMoments(len(gradients), gradients.mean(0), gradients.square().mean(0))


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_signal_to_noise_by_loops() -> None:
    """Catches: the variance with denominator n, a ratio of means."""
    g = normal(8, 3, 2) + 0.5
    ratios = []
    for j in range(3):
        for k in range(2):
            column = [float(x) for x in g[:, j, k]]
            mean = sum(column) / 8
            variance = sum((x - mean) ** 2 for x in column) / 7
            ratios.append(mean**2 / variance)
    found = gradient_signal_to_noise(moments_of(g))
    assert float(found.mean) == pytest.approx(sum(ratios) / 6, rel=1e-10)
    assert int(found.num_params) == 6


def test_debiased_signal_to_noise_is_unbiased() -> None:
    """Catches: the plug-in, which finds 1/n of signal in noise alone."""
    n, signal = 10, 0.3
    g = normal(n, 200_000, seed=1) + math.sqrt(signal)
    found = gradient_signal_to_noise(moments_of(g))
    assert float(found.debiased_mean) == pytest.approx(signal, abs=0.005)
    assert float(found.mean) > signal + 0.15
    assert float(found.mean) == pytest.approx((signal + 1 / n) * 9 / 7, rel=0.01)


def test_constant_gradients_are_left_out() -> None:
    """Catches: the infinite ratio of a dead unit, or a small constant added to it."""
    g = normal(6, 4, seed=2)
    alone = gradient_signal_to_noise(moments_of(g))
    beside = torch.cat([g, torch.zeros(6, 3, dtype=g.dtype)], dim=1)
    found = gradient_signal_to_noise(moments_of(beside))
    assert float(found.mean) == pytest.approx(float(alone.mean), rel=1e-12)
    assert int(found.num_constant) == 3
    assert float(evidence_stopping(moments_of(beside))) == pytest.approx(
        float(evidence_stopping(moments_of(g))), rel=1e-12
    )


def test_too_few_examples_have_no_debiased_value() -> None:
    assert math.isnan(
        float(gradient_signal_to_noise(moments_of(normal(3, 5))).debiased_mean)
    )


def test_evidence_tells_signal_from_noise() -> None:
    """Catches: a wrong factor n, with which it never crosses zero."""
    n = 50
    noise = normal(n, 100_000, seed=3)
    assert float(evidence_stopping(moments_of(noise))) == pytest.approx(
        1 - (n - 1) / (n - 3), abs=0.02
    )
    assert float(evidence_stopping(moments_of(noise + 0.5))) < -5


def test_biased_variance_trace_is_that_of_cabs() -> None:
    """Catches: the n - 1 denominator, with which CABS is not the authors' own."""
    g = normal(7, 9, seed=4)
    xi = sum(float((g[:, j] - g[:, j].mean()).square().mean()) for j in range(9))
    moments = moments_of(g)
    assert float(moments.biased_variance_trace) == pytest.approx(xi, rel=1e-12)
    assert float(moments.variance.sum()) == pytest.approx(xi * 7 / 6, rel=1e-12)
    assert cabs_batch_size(xi, 0.25, 0.1) == pytest.approx(0.1 * xi / 0.25)


def test_cabs_at_the_ends() -> None:
    assert cabs_batch_size(1.0, 0.0, 0.1) == math.inf
    assert cabs_batch_size(0.0, 0.0, 0.1) == 0.0
    with pytest.raises(UsageError, match=r"not negative, got -1\.0 and 0\.1"):
        cabs_batch_size(1.0, -1.0, 0.1)


def test_rounding_makes_no_negative_variance() -> None:
    """Catches: a variance below zero, and with it a NaN, of equal gradients."""
    g = torch.full((5, 4), 0.1, dtype=torch.float32)
    assert bool((moments_of(g).variance >= 0).all())


def test_bad_input_is_named() -> None:
    with pytest.raises(BatchSizeError, match="2 examples, got 1"):
        moments_of(torch.ones(1, 3))
    with pytest.raises(UsageError, match=r"one shape, got \(2,\) and \(3,\)"):
        ElementMoments(4, torch.ones(2), torch.ones(3))


def test_printed_moments_are_a_line() -> None:
    """Catches: every parameter's moments on the screen."""
    moments = moments_of(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert str(moments) == (
        "gradients of 2 examples over 2 parameters: |mean|² 8, total variance 2"
    )
    assert repr(moments) == "ElementMoments(num_examples=2)"
