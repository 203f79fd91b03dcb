"""Quantities from second moments of the gradient, element by element."""

from collections.abc import Sequence

import torch
from torch import Tensor

from noisekit.core.layers.rule import widen
from noisekit.core.results import Unavailable
from noisekit.noise.step_quantity import StepQuantity
from noisekit.noise.step_statistics import signal_ratios
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import CapturedCall, StepRecord
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.step_metrics.metric import (
    MetricStep,
    State,
    StepCapture,
    StepMetric,
    call_fault,
)


class SecondMoments(StepCapture):
    """``sum u_i²`` element by element, compared with the gradient's square.

    Takes the memory of the parameters once more, of a second micro-batch again while
    it is read, and some of the largest layer to compare them.
    """

    def __init__(self, context: ProbeContext) -> None:
        self._context = context
        self._parameters = context.recorder.parameters
        self._units = context.recorder.units
        self._ratios: Tensor | None = None

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the layers' calls and the examples' squares."""
        recorder.wanted.examples = True
        recorder.units.request.squares = True
        self._ratios = None

    def on_calls(self, index: int, calls: Sequence[CapturedCall]) -> None:
        """Read the sums of squares of one parameter."""
        squares = calls[0].forward_pass.gathered.setdefault(self, {})
        squares[index] = self._units.square_sums(index, calls)

    def on_gradient(self, record: StepRecord) -> None:
        """Compare the step's second moments so far with its gradient so far."""
        passes, self._ratios = record.passes, None
        if not passes or any(
            p.faults or p.unread or not p.num_examples for p in passes
        ):
            return
        squares: dict[int, Tensor] = passes[0].gathered.get(self, {})
        for forward_pass in passes[1:]:
            others: dict[int, Tensor] = forward_pass.gathered.get(self, {})
            for index, other in others.items():
                own = squares.get(index)
                squares[index] = other if own is None else own.add_(other)
            others.clear()
        if squares:
            share = self._context.weights_of(record).example_sq_sum
            self._ratios = self._sums(squares, share)

    def _sums(self, squares: dict[int, Tensor], share: float | Tensor) -> Tensor:
        """Sum of ratios and number of entries per parameter ``(2, Q)``."""
        nothing = next(iter(squares.values())).new_zeros(())
        found = []
        for index, parameter in enumerate(self._parameters):
            total, count = nothing, nothing
            if index in squares and parameter.grad is not None:
                mean = widen(parameter.grad)
                total, count = signal_ratios(mean, squares[index].to(mean.dtype), share)
            found.append(torch.stack((total, count.to(total.dtype))))
        return torch.stack(found, 1)

    def state(self, step: StepInputs) -> State | Unavailable:
        """Return mean ratios in total and per parameter ``(1 + Q,)``."""
        for forward_pass in step.passes:
            forward_pass.gathered.pop(self, None)  # as large as the parameters
        fault, ratios = call_fault(step), self._ratios
        if fault or ratios is None:
            return fault or Unavailable("the second moments were not read")
        sums = torch.cat((ratios.sum(1, keepdim=True), ratios), 1)
        return {"ratio": sums[0] / sums[1], "share": step.weights.example_sq_sum}


class GradientSignalToNoise(StepMetric):
    """``ḡ_j² / Var(g_j)`` averaged over entries, plain and less the mean's noise."""

    name = "gsnr"
    quantities = ("gsnr", "debiased_gsnr")
    single_process = (
        "each parameter's second moment would have to be summed over the ranks, a "
        "second exchange of the gradient's size"
    )

    def set_up(self, context: ProbeContext) -> None:
        """Have the second moments captured."""
        self._moments = context.shared(SecondMoments)

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return the mean ratios and the examples' weight."""
        return self._moments.state(step)

    def value(self, step: MetricStep) -> dict[str, StepQuantity]:
        """Return both ratios; with ``n`` examples ``r (n - 3)/(n - 1) - 1/n``."""
        ratio, share = step.tensor("ratio"), step.state["share"]
        n = 1 / share
        debiased = ratio * ((n - 3) / (n - 1)) - share
        return {"gsnr": StepQuantity(ratio), "debiased_gsnr": StepQuantity(debiased)}


class EvidenceStopping(StepMetric):
    """``1 - n`` times the mean ratio; training may stop above zero."""

    name = "evidence_stopping"
    single_process = GradientSignalToNoise.single_process

    def set_up(self, context: ProbeContext) -> None:
        """Have the second moments captured."""
        self._moments = context.shared(SecondMoments)

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return the mean ratios and the examples' weight."""
        return self._moments.state(step)

    def value(self, step: MetricStep) -> StepQuantity:
        """Return the criterion."""
        return StepQuantity(1 - step.tensor("ratio") / step.state["share"])
