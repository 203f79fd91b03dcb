"""Noise from the squared norms of single examples' gradients, all or a random part."""

import torch
from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_weights import Number
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs


class PerExample(NoiseEstimator):
    """Every example's own norm, per layer, from the layer's input and output gradient.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, at a small batch of 1.
    """

    name = "per_example"
    reads_calls = True

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the norms of all examples."""
        recorder.wanted.examples = True
        recorder.units.request.per_example = True

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the moments over all examples, of the parameters that were read."""
        fault = step.call_fault(lambda p: p.sq_norms)
        if fault:
            return fault
        tables = [step.table(p.sq_norms) for p in step.passes]  # (Q, n) each
        weights, unread = step.weights, step.unread
        moments, layers = step.units(tables, weights.example_sq_sum, without=unread)
        own = [
            _own_sq_norms(table.sum(0), share)
            for table, share in zip(tables, weights.of_examples(), strict=True)
        ]
        return StepNoise(
            self.name,
            self.name,
            step.methods,
            moments,
            layers,
            weights.note,
            own[0] if len(own) == 1 else torch.cat(own),
            unread,
        )


def _own_sq_norms(contributions: Tensor, share: Number) -> Tensor:
    """``|g_i|²`` from ``|u_i|²``; zero for examples that the loss does not count."""
    if not isinstance(share, Tensor):
        return contributions / share**2
    norms = torch.where(share > 0, contributions / share.square(), 0.0)
    return norms.to(contributions.dtype)  # weights are wider


class Rows(NoiseEstimator):
    """The norms of a random share of the examples, which stand for all."""

    name = "rows"
    reads_calls = True
    settings = ("row_share",)

    def __init__(self, *, row_share: float) -> None:
        """Read ``row_share`` of every micro-batch's examples."""
        self._share = row_share

    def set_up(self, context: ProbeContext) -> None:
        """Take the probe's generator."""
        self._generator = context.generator

    def install(self, recorder: Recorder) -> None:
        """Have the rows drawn by the probe's generator."""
        recorder.units.generator = self._generator

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the norms of some rows."""
        recorder.wanted.examples = True
        recorder.units.request.row_share = self._share

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the moments over the rows that were drawn."""
        fault = step.call_fault(lambda p: p.row_norms)
        if fault:
            return fault
        tables = [step.table(p.row_norms) for p in step.passes]
        weights, unread = step.weights, step.unread
        read = [n / t.shape[1] for n, t in zip(weights.sizes, tables, strict=True)]
        moments, layers = step.units(
            tables, weights.example_sq_sum, read=read, without=unread
        )
        of = f"{moments.num_read} of {moments.num_units} rows"
        methods = {name: f"{way}, {of}" for name, way in step.methods.items()}
        return StepNoise(
            self.name, self.name, methods, moments, layers, weights.note, None, unread
        )
