"""Noise of the preconditioned gradient ``P g`` that an adaptive optimizer applies."""

import math

import torch

from noisekit.core.results import Unavailable
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.preconditioner import Preconditioner
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs


class Preconditioned(NoiseEstimator):
    """``tr(P Σ P)`` and ``|P G|²`` from sums of squares element by element.

    Source:
        Qiao et al. 2021 (Pollux), arXiv:2008.12260, section 3.1.
    """

    name = "preconditioned"
    reads_calls = True

    def set_up(self, context: ProbeContext) -> None:
        """Find the optimizer's second moments.

        Raises:
            UsageError: If it has none.
        """
        self._preconditioner = Preconditioner(
            context.optimizer, context.recorder.parameters
        )

    def install(self, recorder: Recorder) -> None:
        """Have a recorder read the optimizer's second moments."""
        recorder.units.preconditioner = self._preconditioner

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request sums of preconditioned squares."""
        recorder.wanted.examples = True
        recorder.units.request.preconditioned = True

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the moments of ``P u_i`` over all examples."""
        fault = step.call_fault(lambda p: p.read)
        if fault:
            return fault
        gradient = step.record.scaled_gradient
        if gradient is None or not all(p.scaled_sums for p in step.passes):
            return Unavailable(
                "the optimizer has no second moments before its first step"
            )
        unread = step.unread
        own = gradient * step.scale
        if unread:
            own = own.where(step.mask(unread), 0.0)
        tables = [
            step.table({i: s.reshape(1) for i, s in p.scaled_sums.items()})
            for p in step.passes
        ]  # (Q, 1) each
        by_parameter = torch.cat(tables, 1).sum(1)
        layers, moments = (
            GradientMoments(
                step.record.num_examples,
                1,
                step.weights.example_sq_sum,
                total,
                torch.full_like(total, math.nan),  # fourth moments would cost more
                norm,
            )
            for total, norm in ((by_parameter, own), (by_parameter.sum(), own.sum()))
        )
        return StepNoise(
            self.name,
            self.name,
            {name: f"{way}, squares" for name, way in step.methods.items()},
            moments,
            step.masked(layers, unread),
            step.weights.note,
            unread=unread,
            of_step_gradient=False,
        )
