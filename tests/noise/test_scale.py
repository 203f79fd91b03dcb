"""Noise scales against gradients whose mean and covariance are known."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.noise import (
    per_example_noise_scale,
    ratio_of_averages,
    two_batch_noise_scale,
)
from tests.reference import noise as reference

NUM_PARAMS = 12
REPEATS = 1_000


@dataclass(frozen=True)
class Gaussian:
    """Gradients ``G + S^(1/2) z`` with unequal variances."""

    mean: Tensor
    scales: Tensor

    @property
    def variance_trace(self) -> float:
        return float(self.scales.square().sum())

    @property
    def grad_sq_norm(self) -> float:
        return float(self.mean.square().sum())

    @property
    def noise_scale(self) -> float:
        return self.variance_trace / self.grad_sq_norm

    def draw(self, *shape: int, seed: int) -> Tensor:
        """Gradients of shape ``(*shape, P)``."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(*shape, len(self.mean), generator=generator).double()
        return self.mean + z * self.scales


def gaussian(signal: float) -> Gaussian:
    scales = torch.linspace(0.2, 2.0, NUM_PARAMS, dtype=torch.float64)
    mean = torch.ones(NUM_PARAMS, dtype=torch.float64)
    return Gaussian(mean * signal / math.sqrt(NUM_PARAMS), scales)


def step_parts(grads: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased parts per step from ``(..., n, P)``, written out."""
    n = grads.shape[-2]
    mean_sq = grads.square().sum(-1).mean(-1)
    sq_mean = grads.mean(-2).square().sum(-1)
    return n * (mean_sq - sq_mean) / (n - 1), (n * sq_mean - mean_sq) / (n - 1)


def test_two_batches_recover_a_known_gaussian() -> None:
    """With known mean and covariance, both parts lie within 4 standard errors.

    Catches: exchanging b and B; averaging ratios instead of parts.
    """
    truth = gaussian(1.0)
    grads = truth.draw(20_000, 64, seed=0)
    small = grads[:, :8].mean(1).square().sum(1)
    big = grads.mean(1).square().sum(1)
    found = two_batch_noise_scale(small, big, small_batch=8, big_batch=64)
    for estimate, expected in (
        (found.variance_trace, truth.variance_trace),
        (found.debiased_grad_sq_norm, truth.grad_sq_norm),
    ):
        assert estimate.stderr is not None
        assert abs(estimate.value - expected) < 4 * estimate.stderr
    assert found.simple_noise_scale.interval(0.9999).contains(truth.noise_scale)


@pytest.mark.parametrize("sizes", [(8, 8), (0, 8), (16, 8)])
def test_two_batches_need_two_sizes(sizes: tuple[int, int]) -> None:
    small, big = sizes
    message = f"1 <= small_batch < big_batch, got small_batch={small}, big_batch={big}"
    with pytest.raises(BatchSizeError, match=message):
        two_batch_noise_scale(
            torch.ones(2), torch.ones(2), small_batch=small, big_batch=big
        )


def test_per_example_form_is_the_covariance() -> None:
    """Catches: the biased 1/n covariance; a mean that keeps its own noise."""
    grads = gaussian(1.0).draw(9, seed=1)
    inner = grads @ grads.mean(0)
    found = per_example_noise_scale(grads.square().sum(1), inner)
    trace = reference.variance_trace([grads])
    assert found.variance_trace.value == pytest.approx(trace)
    norm = reference.debiased_grad_sq_norm([grads])
    assert found.debiased_grad_sq_norm.value == pytest.approx(norm)


def test_per_example_error_is_the_jackknife_written_out() -> None:
    """Catches: a closed form that leaves out the example's own norm."""
    grads = gaussian(1.0).draw(7, seed=2)
    found = per_example_noise_scale(
        grads.square().sum(1), grads @ grads.mean(0)
    ).simple_noise_scale.ratio
    left_out = torch.tensor(
        [
            [reference.variance_trace([rest]), reference.debiased_grad_sq_norm([rest])]
            for i in range(7)
            for rest in (torch.cat([grads[:i], grads[i + 1 :]]),)
        ],
        dtype=torch.float64,
    )
    expected = torch.cov(left_out.T, correction=0) * 6
    assert found is not None
    assert found.numerator_variance == pytest.approx(float(expected[0, 0]))
    assert found.denominator_variance == pytest.approx(float(expected[1, 1]))
    assert found.covariance == pytest.approx(float(expected[0, 1]))


def test_per_example_form_is_unbiased() -> None:
    """Means over 1,000 repeats lie within 4 standard errors of the truth.

    Catches: n where n - 1 belongs, in either part.
    """
    truth = gaussian(0.3)
    traces, norms = step_parts(truth.draw(REPEATS, 5, seed=3))
    found = [
        per_example_noise_scale(g.square().sum(1), g @ g.mean(0))
        for g in truth.draw(REPEATS, 5, seed=3)
    ]
    for mine, expected in (
        ([f.variance_trace.value for f in found], truth.variance_trace),
        ([f.debiased_grad_sq_norm.value for f in found], truth.grad_sq_norm),
    ):
        values = torch.tensor(mine, dtype=torch.float64)
        error = float(values.std()) / math.sqrt(REPEATS)
        assert abs(float(values.mean()) - expected) < 4 * error
    torch.testing.assert_close(
        torch.tensor([f.variance_trace.value for f in found]).double(),
        traces,
        rtol=1e-5,
        atol=1e-8,
    )
    assert float(norms.min()) < 0  # negative estimates belong to the mean


def covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


def test_per_example_intervals_cover() -> None:
    """95 % intervals of all three quantities cover in about 95 of 100 cases.

    Catches: an error without the covariance of the parts; a normal interval of the
    ratio, which is skewed.
    """
    truth = gaussian(1.0)
    found = [
        per_example_noise_scale(g.square().sum(1), g @ g.mean(0))
        for g in truth.draw(REPEATS, 200, seed=4)
    ]
    for name, expected in (
        ("variance_trace", truth.variance_trace),
        ("debiased_grad_sq_norm", truth.grad_sq_norm),
        ("simple_noise_scale", truth.noise_scale),
    ):
        intervals = [getattr(f, name).interval() for f in found]
        share = covered([(i.low, i.high) for i in intervals], expected)
        assert 0.925 < share < 0.975, name


@pytest.mark.parametrize("signal", [1.0, 0.15])
def test_averages_over_steps_cover(signal: float) -> None:
    """Also where the signal is weak and most steps have a negative part.

    Catches: negative parts dropped; a ratio averaged over steps; a normal quantile
    where 20 blocks have 19 degrees of freedom.
    """
    truth = gaussian(signal)
    generator_seeds = range(REPEATS)
    grads = truth.draw(REPEATS, 60, 16, seed=5)
    traces, norms = step_parts(grads)
    intervals = []
    for k in generator_seeds:
        found = ratio_of_averages(traces[k], norms[k]).simple_noise_scale
        interval = found.interval()
        intervals.append((interval.low, interval.high))
    assert 0.925 < covered(intervals, truth.noise_scale) < 0.975


def test_steps_weigh_by_their_weights() -> None:
    """Catches: an average of averages over steps of unequal size."""
    traces, norms = torch.tensor([1.0, 4.0, 4.0]), torch.tensor([2.0, 5.0, 5.0])
    weights = torch.tensor([6.0, 1.0, 1.0])
    found = ratio_of_averages(traces, norms, weights=weights)
    assert found.variance_trace.value == pytest.approx(14 / 8)
    assert found.debiased_grad_sq_norm.value == pytest.approx(22 / 8)


def test_blocks_see_correlation_between_neighbours() -> None:
    """Steps in runs of ten alike: the error must be that of a tenth of the steps.

    Catches: a jackknife over single steps of a correlated series.
    """
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(20, generator=generator).double().repeat_interleave(10) + 5
    found = ratio_of_averages(values, torch.ones(200), num_blocks=20)
    expected = float(values[::10].std()) / math.sqrt(20)
    assert found.variance_trace.stderr == pytest.approx(expected)
    assert found.variance_trace.dof == 19


def test_no_signal_keeps_its_confidence_set() -> None:
    """Catches: a negative denominator that gives a negative number of examples."""
    traces = torch.tensor([10.0, 11.0, 9.0, 10.0])
    norms = torch.tensor([-0.2, 0.1, 0.05, -0.15])
    found = ratio_of_averages(traces, norms).simple_noise_scale
    assert math.isnan(found.value)
    assert found.status is Status.NO_SIGNAL
    assert found.error_source is ErrorSource.STEPS
    assert str(found.interval()).startswith("more than ")


def test_unresolved_ratio_says_more_than() -> None:
    """Catches: a finite interval although the denominator may be zero."""
    traces = torch.tensor([10.0, 11.0, 9.0, 10.0])
    norms = torch.tensor([-0.2, 0.3, 0.25, -0.15])
    found = ratio_of_averages(traces, norms).simple_noise_scale
    assert found.status is Status.NOT_RESOLVED
    assert math.isinf(found.interval().high)


def test_averages_need_two_steps_of_both_parts() -> None:
    with pytest.raises(UsageError, match="same 2 or more steps, got 1 and 1"):
        ratio_of_averages(torch.ones(1), torch.ones(1))
    with pytest.raises(UsageError, match="same 2 or more steps, got 3 and 2"):
        ratio_of_averages(torch.ones(3), torch.ones(2))


def test_per_example_errors_need_three_examples() -> None:
    with pytest.raises(BatchSizeError, match="needs 3 examples, got 2"):
        per_example_noise_scale(torch.ones(2), torch.ones(2))
