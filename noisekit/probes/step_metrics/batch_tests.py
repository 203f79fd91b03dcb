"""Whether the batch is large enough, by criteria that need the moments alone."""

import torch
from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.noise.moments import GradientMoments
from noisekit.noise.step_quantity import StepQuantity
from noisekit.noise.step_statistics import norm_statistic
from noisekit.probes.reading import Reading
from noisekit.probes.step_metrics.metric import MetricStep, StepMetric


def step_moments(reading: Reading) -> GradientMoments | Unavailable:
    """Return the moments of the step's own gradient, or why there are none."""
    if reading.moments is None:
        return Unavailable(reading.coverage.reason or "the noise was not read")
    if not reading.of_step_gradient:
        return Unavailable(
            f"estimator={reading.estimator!r} is not of the step's own gradient"
        )
    return reading.moments


class _OfMoments(StepMetric):
    """A function of the moments, in total and per parameter."""

    def value(self, step: MetricStep) -> StepQuantity | Unavailable:
        """Return the function of the total moments and of each parameter's."""
        moments = step_moments(step.reading)
        if isinstance(moments, Unavailable):
            return moments
        total, layers = self._of(moments).reshape(1), step.reading.layer_moments
        both = [total] if layers is None else [total, self._of(layers)]
        return StepQuantity(torch.cat(both))

    def _of(self, moments: GradientMoments) -> Tensor:
        raise NotImplementedError


class NormTest(_OfMoments):
    """``θ`` with which the batch passes the norm test just so."""

    name = "norm_test"

    def _of(self, moments: GradientMoments) -> Tensor:
        share = moments.weight_sq_sum / moments.unit_size  # sum w_i² of examples
        trace, _ = moments.trace_and_norm()
        norm = moments.grad_sq_norm
        # What the examples' own squares add up to, whatever the units were.
        return norm_statistic(share * (trace * (1 - share) + norm), norm, share)


class GradientDiversity(_OfMoments):
    """``sum |g_i|² / |sum g_i|²`` of the batch."""

    name = "gradient_diversity"

    def _of(self, moments: GradientMoments) -> Tensor:
        share = moments.weight_sq_sum / moments.unit_size
        trace, _ = moments.trace_and_norm()
        return share * (trace * (1 - share) / moments.grad_sq_norm + 1)
