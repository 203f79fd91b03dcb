"""All that one optimizer step has given; the one place that makes a reading of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.probes.capture.step_weights import Number
from noisekit.probes.capture.tokens import TokenCount
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.estimator_set import EstimatedNoise
from noisekit.probes.reading import Coverage, Reading, estimator_columns
from noisekit.probes.step_metrics.metric import (
    MetricStep,
    Quantity,
    State,
    StepMetric,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step has given, on this rank or over all; tensors on their device.

    Attributes:
        step: Optimizer steps taken, this one included.
        examples_seen: Examples that entered a gradient, this step's included.
        batch_size: Examples behind the step's gradient.
        gradient: ``|g|²`` of the mean gradient per parameter ``(Q,)``.
        sizes: Elements of every parameter.
        methods: By parameter: how its calls are read.
        noise: By each estimator that was asked for.
        states: What every step metric has measured.
        unit: What noise scales are counted in.
        tokens: Tokens that count, or why that is not known; ``None`` where they are
            not asked for.
        clip_factor: What clipping has multiplied the gradient by, where it is known.
        applied_factor: The gradient that is applied, in units of the mean gradient.
        notes: What a reader must know.
    """

    step: int
    examples_seen: int
    batch_size: int
    gradient: Tensor
    sizes: tuple[int, ...]
    methods: Mapping[str, str]
    noise: EstimatedNoise
    states: Mapping[StepMetric, State | Unavailable]
    unit: str = "example"
    tokens: TokenCount | Unavailable | None = None
    clip_factor: Tensor | float | None = None
    applied_factor: Number = 1.0
    notes: tuple[str, ...] = ()

    def reading(self) -> Reading:
        """Return the reading; nothing is waited for."""
        own, tokens = self.noise.noise, self.tokens
        first, *others = self.noise.asked
        missing = {n: str(w) for n, w in self.noise.missing.items() if n != first}
        # Every row of a run has the same columns in the same order.
        blank: dict[str, float | int] = {}
        for name in others:
            blank |= estimator_columns(name, None)
        for metric in self.states:
            blank |= dict.fromkeys(metric.columns(), math.nan)
        for name, noise in self.noise.found.items():
            if noise is not own and noise.unread:
                missing[name] = f"it covers a part: {next(iter(noise.unread.values()))}"
        if isinstance(tokens, Unavailable):
            missing["tokens"], tokens = tokens.reason, None
        bare = self._reading(own, tokens, missing)
        quantities, absent = self._quantities(bare)
        for metric, why in absent.items():
            missing[metric.name] = why
        return self._reading(own, tokens, missing, quantities, blank)

    def lacking(self) -> str:
        """What the noise of the step lacks on this rank; empty where nothing."""
        coverage = self._coverage(self.noise.noise, {})
        return "" if coverage.complete else str(coverage)

    def _quantities(
        self, reading: Reading
    ) -> tuple[dict[str, Quantity], dict[StepMetric, str]]:
        """The values of the step metrics, and why others have none."""
        found: dict[str, Quantity] = {}
        absent: dict[StepMetric, str] = {}
        for metric, state in self.states.items():
            value: Quantity | Mapping[str, Quantity] | Unavailable
            if isinstance(state, Unavailable):
                value = state
            else:
                with torch.no_grad():
                    value = metric.value(
                        MetricStep(reading, state, self.applied_factor)
                    )
            if isinstance(value, Unavailable):
                absent[metric] = value.reason
            elif isinstance(value, StepQuantity | HessianForms):
                found[metric.name] = value
            else:
                found |= value
        return found, absent

    def _reading(
        self,
        own: StepNoise | Unavailable,
        tokens: TokenCount | None,
        missing: Mapping[str, str],
        quantities: Mapping[str, Quantity] | None = None,
        blank: Mapping[str, float | int] | None = None,
    ) -> Reading:
        noise = own if isinstance(own, StepNoise) else None
        return Reading(
            self.step,
            self.examples_seen,
            self.batch_size,
            "none" if noise is None else noise.label,
            self._coverage(own, missing),
            None if noise is None else noise.moments,
            None if noise is None else noise.layer_moments,
            self.gradient,
            None if noise is None else noise.example_sq_norms,
            {
                name: found.moments
                for name, found in self.noise.found.items()
                if found is own or not found.unread
            },
            self.unit,
            tokens,
            self.clip_factor,
            quantities or {},
            noise is None or noise.of_step_gradient,
            blank or {},
        )

    def _coverage(
        self, own: StepNoise | Unavailable, missing: Mapping[str, str]
    ) -> Coverage:
        notes = self.notes
        if isinstance(own, Unavailable):
            note = "; ".join(notes) or None
            reason, way_out = own.reason, own.way_out or None
            return Coverage(self.methods, reason, note, missing, {}, 0.0, way_out)
        if own.note is not None:
            notes = (own.note, *notes)
        names = tuple(self.methods)
        left_out = sum(self.sizes[index] for index in own.unread)
        return Coverage(
            own.methods,
            None,
            "; ".join(notes) or None,
            missing,
            {names[index]: why for index, why in own.unread.items()},
            1 - left_out / sum(self.sizes),
        )
