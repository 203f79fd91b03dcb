"""Ways of other packages that give wrong noise scales, beside the right answer.

Each fault is written out here, seen to miss the truth, and then ours on the same draws.
"""

import math

import pytest
import torch
from torch import Tensor

from noisekit.noise import GradientMoments, ratio_of_averages

NUM_PARAMS = 50


def micro_batches(
    noise_scale: float, *, steps: int, units: int, size: int, seed: int
) -> Tensor:
    """Means over ``size`` examples, ``(steps, units, P)``; ``tr Σ`` = noise_scale.

    The true gradient has length one, and the noise is alike in all directions.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(steps, units, NUM_PARAMS, generator=generator, dtype=torch.float64)
    mean = torch.zeros(NUM_PARAMS, dtype=torch.float64)
    mean[0] = 1.0
    return mean + z * math.sqrt(noise_scale / NUM_PARAMS / size)


def moments_of(units: Tensor, size: int) -> GradientMoments:
    """One entry per step."""
    count = units.shape[1]
    sq_norms = (units / count).square().sum(2)
    return GradientMoments(
        count,
        size,
        1 / count,
        sq_norms.sum(1),
        sq_norms.square().sum(1),
        units.mean(1).square().sum(1),
    )


@pytest.mark.parametrize("noise_scale", [1_000.0, 10_000.0])
def test_clamping_at_every_step_hides_large_noise_scales(noise_scale: float) -> None:
    """AdaScale in fairscale sets negative ``|G|²`` to zero before it averages.

    At 64 examples over 4 ranks it then sees 500 and 660 examples, whatever the truth.
    """
    units = micro_batches(noise_scale, steps=4_000, units=4, size=16, seed=0)
    traces, norms = moments_of(units, 16).trace_and_norm()
    clamped = float(traces.mean() / norms.clamp(min=0).mean())
    assert clamped < 0.55 * noise_scale
    assert clamped < 700
    interval = ratio_of_averages(traces, norms).simple_noise_scale.interval()
    assert interval.contains(noise_scale)


def test_the_mean_of_ratios_is_no_noise_scale() -> None:
    """gns-pytorch averages one clamped ratio per step, three times too much.

    Its truth is 100 examples, at 64 per step.
    """
    units = micro_batches(100.0, steps=2_000, units=64, size=1, seed=1)
    traces, norms = moments_of(units, 1).trace_and_norm()
    ratios = torch.where(norms > 0, traces / norms, 0.0)
    assert float(ratios.mean()) > 150
    assert float(ratios.max()) > 1_000
    found = ratio_of_averages(traces, norms).simple_noise_scale
    assert found.interval().contains(100.0)
    assert found.value == pytest.approx(100.0, rel=0.05)


def test_noise_over_the_noisy_gradient_saturates_at_the_batch_size() -> None:
    """``tr Σ / |g|²`` without debiasing, as from Cockpit's norm test.

    Near 60 of 64 examples where the truth is 1,000.
    """
    units = micro_batches(1_000.0, steps=500, units=64, size=1, seed=2)
    moments = moments_of(units, 1)
    traces, norms = moments.trace_and_norm()
    naive = float(traces.mean() / moments.grad_sq_norm.mean())
    assert 55 < naive < 64
    assert ratio_of_averages(traces, norms).simple_noise_scale.interval().contains(1e3)


def test_the_last_micro_batch_alone_wastes_the_others() -> None:
    """gpt-neox takes one of 8 micro-batches for the small norm.

    Unbiased as well, but with three times the standard error.
    """
    units = micro_batches(500.0, steps=2_000, units=8, size=8, seed=3)
    traces, _ = moments_of(units, 8).trace_and_norm()
    big = units.mean(1).square().sum(1)
    last = (units[:, -1].square().sum(1) - big) / (1 / 8 - 1 / 64)
    assert float(last.mean()) == pytest.approx(500.0, rel=0.02)
    assert float(traces.mean()) == pytest.approx(500.0, rel=0.02)
    assert 2 < float(last.std() / traces.std()) < 4


def test_biased_variance_misses_a_share_of_the_noise() -> None:
    """Cockpit's CABS and BackPACK's Variance divide by n: an eighth at 8 examples."""
    units = micro_batches(50.0, steps=4_000, units=8, size=1, seed=4)
    biased = units.var(1, correction=0).sum(1).mean()
    assert float(biased) == pytest.approx(50.0 * 7 / 8, rel=0.01)
    traces, _ = moments_of(units, 1).trace_and_norm()
    assert float(traces.mean()) == pytest.approx(50.0, rel=0.01)
