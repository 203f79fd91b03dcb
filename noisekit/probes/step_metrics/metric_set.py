"""The table of step metrics, and the ones of a probe, fed by its backward passes."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from noisekit.core.errors import UsageError
from noisekit.core.results import Unavailable
from noisekit.probes.capture.step_record import CapturedCall, StepRecord
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.step_metrics.batch_tests import GradientDiversity, NormTest
from noisekit.probes.step_metrics.cabs import Cabs, CabsConvCompat
from noisekit.probes.step_metrics.gradient_norms import GradHistogram
from noisekit.probes.step_metrics.hessian_forms import HessianNoise
from noisekit.probes.step_metrics.inner_products import (
    InnerProductTest,
    OrthogonalityTest,
)
from noisekit.probes.step_metrics.metric import State, StepCapture, StepMetric
from noisekit.probes.step_metrics.movement import (
    DistanceFromStart,
    GradientCosine,
    UpdateSize,
)
from noisekit.probes.step_metrics.signal_to_noise import (
    EvidenceStopping,
    GradientSignalToNoise,
)

METRICS: Mapping[str, type[StepMetric]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            NormTest,
            InnerProductTest,
            OrthogonalityTest,
            GradientDiversity,
            Cabs,
            CabsConvCompat,
            GradientSignalToNoise,
            EvidenceStopping,
            GradHistogram,
            UpdateSize,
            DistanceFromStart,
            GradientCosine,
            HessianNoise,
        )
    }
)
"""All step metrics by name."""


class MetricSet:
    """The step metrics of one probe; listens to its recorder.

    Attributes:
        metrics: The metrics, in the order that was asked for.
    """

    def __init__(self, metrics: Sequence[StepMetric], context: ProbeContext) -> None:
        """Set the metrics up.

        Raises:
            UsageError: If one does not fit into the loop.
        """
        self.metrics = tuple(metrics)
        names = [metric.name for metric in metrics]
        if len(set(names)) < len(names):
            raise UsageError(
                f"quantities needs each name once, got {', '.join(names)}."
            )
        self._recorder = context.recorder
        for metric in metrics:
            metric.set_up(context)
            _check_ranks(metric, context.recorder.replicas.ranks.size)
        parts: tuple[StepCapture, ...] = (*context.captures(), *metrics)
        self._parts = parts
        self._on_calls = _overriding(parts, "on_calls")
        self._on_gradient = _overriding(parts, "on_gradient")
        self._on_loss = _overriding(parts, "on_loss")
        self._before = _overriding(parts, "before_step")
        self._wanted = False
        self._handles: list[RemovableHandle] = []
        if metrics:
            context.recorder.listener = self
        if self._before:
            hook = context.optimizer.register_step_pre_hook(self._before_step)
            self._handles.append(hook)

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --------------------------------------------------------------- while training

    def request(self, *, wanted: bool, num_readings: int) -> None:
        """Request what the next step's passes are to capture beside the noise.

        Args:
            wanted: Whether the step is read at all.
            num_readings: Readings so far.
        """
        self._wanted = wanted
        for part in self._parts:
            part.wanted = wanted
            if wanted:
                part.request(self._recorder, num_readings)

    def read(self, index: int, calls: Sequence[CapturedCall]) -> None:
        """Pass on the calls of a parameter whose gradient is complete."""
        for part in self._on_calls if self._wanted else ():
            part.on_calls(index, calls)

    def gradient_ready(self, record: StepRecord) -> None:
        """Pass on what a backward pass has left."""
        for part in self._on_gradient if self._wanted else ():
            part.on_gradient(record)

    def on_loss(self, targets: Any, loss: Tensor) -> None:  # whatever the loss takes
        """Pass on the loss of the open pass, before its backward pass."""
        active = self._recorder.active
        if active is None:
            return
        for part in self._on_loss if self._wanted else ():
            part.on_loss(active, targets, loss)

    def _before_step(self, *_: object) -> None:
        for part in self._before if self._wanted else ():
            part.before_step()

    # --------------------------------------------------------------------- readings

    @torch.no_grad()
    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> dict[StepMetric, State | Unavailable]:
        """Return what every metric has of this rank's step."""
        return {metric: metric.measure(step, noise) for metric in self.metrics}

    def resume(self) -> None:
        """Note that training began before the probe was attached."""
        for metric in self.metrics:
            metric.resume()

    def state_dict(self) -> dict[str, Any]:  # plain values that JSON can hold
        """Return the metrics' own states by name; copies of parameters are none."""
        return {m.name: state for m in self.metrics if (state := m.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # read from a file
        """Go on where the metrics that gave ``state`` were."""
        for metric in self.metrics:
            if metric.name in state:
                metric.load_state_dict(state[metric.name])


def _overriding(parts: Iterable[StepCapture], method: str) -> tuple[StepCapture, ...]:
    """The parts that have a method of their own: others are not worth a call."""
    default = getattr(StepCapture, method)
    return tuple(p for p in parts if getattr(type(p), method) is not default)


def _check_ranks(metric: StepMetric, num_ranks: int) -> None:
    if num_ranks > 1 and metric.single_process:
        raise UsageError(
            f"quantities={metric.name!r} needs one process, got {num_ranks} ranks: "
            f"{metric.single_process}; leave it out, or measure at frozen weights."
        )
