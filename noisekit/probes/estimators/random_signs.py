"""Noise from extra backward passes in which examples count with random signs."""

from dataclasses import replace

import torch

from noisekit.core.results import Unavailable
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.signed_backward import SignedBackward
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs


class RandomSigns(NoiseEstimator):
    """``sum |u_i|²`` from ``|sum s_i u_i|²`` with independent signs ``s_i = ±1``.

    Source:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".
    """

    name = "random_signs"
    settings = ("num_signs",)

    def __init__(self, *, num_signs: int) -> None:
        """Draw signs ``num_signs`` times for every micro-batch."""
        self._num_signs = num_signs

    def set_up(self, context: ProbeContext) -> None:
        """Take the probe's generator."""
        self._generator = context.generator

    def install(self, recorder: Recorder) -> None:
        """Hook the model's output."""
        recorder.signed = SignedBackward(
            recorder.caller,
            recorder.parameters,
            recorder,
            generator=self._generator,
            batch_dim=recorder.batch_dim,
            rank=recorder.replicas.ranks.rank,
        )

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the extra backward passes."""
        recorder.wanted.examples = True
        assert recorder.signed is not None
        recorder.signed.num_signs = self._num_signs

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the moments over all examples."""
        fault = _fault(step)
        if fault:
            return Unavailable(fault)
        by_pass = [torch.stack(p.signed_norms).mean(0) for p in step.passes]  # (Q,)
        sums = torch.stack(by_pass).sum(0) * step.scale
        draws = self._num_signs
        layers, moments = (
            _with_chance_bound(
                GradientMoments(
                    step.record.num_examples,
                    1,
                    step.weights.example_sq_sum,
                    total,
                    total,
                    gradient,
                ),
                draws,
            )
            for total, gradient in (
                (sums, step.gradient),
                (sums.sum(), step.gradient.sum()),
            )
        )
        methods = dict.fromkeys(step.methods, f"random signs, {draws} drawn")
        note = step.weights.note
        return StepNoise(self.name, self.name, methods, moments, layers, note)


def _fault(step: StepInputs) -> str:
    """Why the signs tell nothing of this step, if so."""
    passes = step.passes
    faults = [fault for p in passes for fault in p.signed_faults]
    faults += [p.coupling for p in passes if p.coupling]
    if faults:
        return faults[0]
    if not all(p.signed_norms for p in passes):
        return "no gradient of the model's output arrived"
    if step.record.num_examples * step.num_ranks < 2:
        return f"noise needs 2 examples per step, got {step.record.num_examples}"
    return ""


def _with_chance_bound(moments: GradientMoments, draws: int) -> GradientMoments:
    """Fourth moments that stand for the chance of the signs, not for the examples.

    ``|sum s_i u_i|²`` has at most twice its squared mean as variance.
    """
    n = moments.num_effective
    mean_fourth = moments.mean_sq_norm.square() * (1 + 2 * (n - 1) / draws)
    return replace(moments, sum_fourth=mean_fourth / n**3)
