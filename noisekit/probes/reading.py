"""What a probe reads at one optimiser step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from noisekit.core.results import Estimate, Status
from noisekit.noise.moments import GradientMoments


@dataclass(frozen=True, slots=True)
class Coverage:
    """How the parameters were read, and why not.

    Attributes:
        methods: By parameter: a layer's rule, or the replay of a module.
        reason: Why there are no readings of the noise; ``None`` where there are.
        note: What a reader must know of the reading, such as unequal micro-batches.
    """

    methods: Mapping[str, str]
    reason: str | None = None
    note: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the noise was read, of all parameters."""
        return self.reason is None

    def __str__(self) -> str:
        """Say it in one line."""
        if self.reason is not None:
            return f"no noise: {self.reason}"
        ways = sorted(set(self.methods.values()))
        text = f"{len(self.methods)} parameters by {', '.join(ways)}"
        return text if self.note is None else f"{text}; {self.note}"


@dataclass(frozen=True, slots=True)
class LayerReading:
    """One parameter's part of a reading.

    Attributes:
        name: The parameter's name.
        grad_sq_norm: Its part of the squared gradient norm [loss²/param²].
        variance_trace: Its part of ``tr Σ`` [loss²/param²].
        debiased_grad_sq_norm: Its part of ``|G|²``; may be negative [loss²/param²].
        simple_noise_scale: Of this parameter alone [examples].
    """

    name: str
    grad_sq_norm: Estimate
    variance_trace: Estimate
    debiased_grad_sq_norm: Estimate
    simple_noise_scale: Estimate


@dataclass(frozen=True, slots=True)
class Reading:
    """Gradient and gradient noise of one optimiser step.

    Values stay on the training device until they are asked for; then one small
    transfer makes them Python numbers.

    Attributes:
        step: Optimiser steps taken, this one included.
        examples_seen: Examples that entered a gradient, this step's included.
        batch_size: Examples behind this step's gradient.
        estimator: ``"per_example"``, ``"ghost(b)"`` for ghost batches of ``b``
            examples, or ``"none"``.
        coverage: How each parameter was read, or why the noise was not.
        moments: Sufficient statistics of the noise; ``None`` where there are none.
        layer_moments: The same with one entry per parameter.
        layer_sq_norms: Squared norm of the mean gradient per parameter.
        example_sq_norms: ``|g_i|²`` per example of the step.
    """

    step: int
    examples_seen: int
    batch_size: int
    estimator: str
    coverage: Coverage
    moments: GradientMoments | None
    layer_moments: GradientMoments | None
    layer_sq_norms: Tensor
    example_sq_norms: Tensor | None

    @property
    def grad_sq_norm(self) -> Estimate:
        """Squared norm of the mean gradient applied, before clipping [loss²/param²]."""
        return Estimate(float(self.layer_sq_norms.sum()))

    @property
    def variance_trace(self) -> Estimate:
        """``tr Σ`` per example [loss²/param²]."""
        return _finalised(self.moments)[0]

    @property
    def debiased_grad_sq_norm(self) -> Estimate:
        """``|G|²`` without the noise's part; may be negative [loss²/param²]."""
        return _finalised(self.moments)[1]

    @property
    def simple_noise_scale(self) -> Estimate:
        """``tr Σ / |G|²`` of this step alone, with a wide interval [examples]."""
        return _finalised(self.moments)[2]

    @property
    def status(self) -> Status:
        """Whether the noise of this step can be relied on."""
        return self.simple_noise_scale.status

    @property
    def layers(self) -> tuple[LayerReading, ...]:
        """The reading parameter by parameter."""
        norms = self.layer_sq_norms.tolist()
        return tuple(
            LayerReading(name, Estimate(norm), *self._layer(index))
            for index, (name, norm) in enumerate(
                zip(self.coverage.methods, norms, strict=True)
            )
        )

    def _layer(self, index: int) -> tuple[Estimate, Estimate, Estimate]:
        moments = self.layer_moments
        return _finalised(None if moments is None else moments.layer(index))

    def row(self) -> dict[str, float | int | str]:
        """Return the reading as one flat row: values, sufficient statistics, status."""
        trace, norm, scale = _finalised(self.moments)
        moments = self.moments
        return {
            "step": self.step,
            "examples_seen": self.examples_seen,
            "batch_size": self.batch_size,
            "grad_sq_norm": self.grad_sq_norm.value,
            "variance_trace": trace.value,
            "debiased_grad_sq_norm": norm.value,
            "simple_noise_scale": scale.value,
            "unit": "example" if moments is None or moments.unit_size == 1 else "chunk",
            "unit_size": 1.0 if moments is None else float(moments.unit_size),
            "num_units": 0 if moments is None else moments.num_units,
            "mean_sq_norm": math.nan
            if moments is None
            else float(moments.mean_sq_norm),
            "mean_fourth": math.nan if moments is None else float(moments.mean_fourth),
            "estimator": self.estimator,
            "coverage": float(self.coverage.complete),
            "status": str(scale.status),
        }


def _finalised(moments: GradientMoments | None) -> tuple[Estimate, Estimate, Estimate]:
    found = None if moments is None else moments.finalise()
    if found is None:
        nothing = Estimate(math.nan, status=Status.UNAVAILABLE)
        return nothing, nothing, nothing
    return (
        found.variance_trace,
        found.debiased_grad_sq_norm,
        found.simple_noise_scale,
    )
