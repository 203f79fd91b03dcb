"""The Hessian noise scale of Gaussian gradients, where its truth is known."""

import math

import pytest
import torch
from torch import Tensor

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.noise import HessianNoiseScale, hessian_noise_scale

CURVATURE = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
SPREAD = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
GRADIENT = torch.tensor([0.8, -0.6, 0.5, 0.3], dtype=torch.float64)
NOISE = float((CURVATURE * SPREAD**2).sum())
SIGNAL = float((CURVATURE * GRADIENT**2).sum())


def chunk_gradients(repeats: int, chunks: int, chunk_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(repeats, chunks, 4, generator=generator, dtype=torch.float64)
    return GRADIENT + normal * SPREAD / math.sqrt(chunk_size)


def measured(repeats: int, chunks: int, chunk_size: int) -> list[HessianNoiseScale]:
    gradients = chunk_gradients(repeats, chunks, chunk_size)
    forms = (gradients * CURVATURE) @ gradients.mT
    return [hessian_noise_scale(form, chunk_size=chunk_size) for form in forms]


def test_both_parts_are_unbiased() -> None:
    """Catches: ``ḡ'Hḡ`` for ``G'HG``, which contains the noise; a lost chunk size."""
    found = measured(4000, 5, 8)
    for values, truth in (
        ([f.noise_curvature.value for f in found], NOISE),
        ([f.gradient_curvature.value for f in found], SIGNAL),
    ):
        sample = torch.tensor(values)
        error = float(sample.std()) / math.sqrt(len(sample))
        assert abs(float(sample.mean()) - truth) < 4 * error


def test_intervals_cover_the_truth() -> None:
    """Catches: errors of one chunk for those of the mean; jackknife factors."""
    found = measured(1000, 40, 4)
    truth = NOISE / SIGNAL
    sets = [f.hessian_noise_scale.interval() for f in found]
    hits = sum(s.low <= truth <= s.high for s in sets)
    assert 0.92 <= hits / len(found) <= 0.98


def test_jackknife_by_leaving_chunks_out() -> None:
    """Catches: a row taken away without its column, or its corner twice."""
    gradients = chunk_gradients(1, 6, 3)[0]
    forms = (gradients * CURVATURE) @ gradients.T
    values = []
    for k in range(6):
        keep = [i for i in range(6) if i != k]
        part = hessian_noise_scale(forms[keep][:, keep], chunk_size=3)
        values.append(part.gradient_curvature.value)
    spread = torch.tensor(values).var(correction=0) * 5
    whole = hessian_noise_scale(forms, chunk_size=3)
    assert whole.gradient_curvature.stderr == pytest.approx(
        math.sqrt(float(spread)), rel=1e-6
    )


def test_indefinite_curvature_has_no_scale() -> None:
    """Catches: a negative batch size, or one clamped to zero."""
    gradients = chunk_gradients(1, 6, 100)[0]
    forms = -(gradients * CURVATURE) @ gradients.T
    found = hessian_noise_scale(forms, chunk_size=100).hessian_noise_scale
    assert math.isnan(found.value)
    assert found.status == "no_signal"


def test_bad_input_is_named() -> None:
    with pytest.raises(BatchSizeError, match="3 chunks of 1 or more examples, got 2"):
        hessian_noise_scale(torch.eye(2), chunk_size=4)
    with pytest.raises(UsageError, match=r"shape \(2, 3\)"):
        hessian_noise_scale(torch.ones(2, 3), chunk_size=4)
