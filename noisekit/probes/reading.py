"""What a probe reads at one optimiser step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from noisekit.core.results import Estimate, Status
from noisekit.core.vocabulary import COLUMNS_OF
from noisekit.noise.moments import MOMENT_COLUMNS, GradientMoments
from noisekit.noise.scale import NoiseScale
from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.probes.capture.tokens import TokenCount
from noisekit.probes.estimators.choice import ESTIMATORS

_NOTHING = Estimate(math.nan, status=Status.UNAVAILABLE)
_LISTED_REPLAYS = 3


@dataclass(frozen=True, slots=True)
class Coverage:
    """How the parameters were read, and why not.

    Attributes:
        methods: By parameter: a layer's rule, or the replay of a module, and for other
            estimators than per-example what was made of it.
        reason: Why there are no readings of the noise; ``None`` where there are.
        note: What a reader must know of the reading, such as unequal micro-batches.
        missing: By estimator that was asked for beside the reading's own, and by
            quantity: why it has nothing to say of this step.
    """

    methods: Mapping[str, str]
    reason: str | None = None
    note: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the noise was read, of all parameters."""
        return self.reason is None

    def __str__(self) -> str:
        """Say it in one line."""
        if self.reason is not None:
            return f"no noise: {self.reason}"
        text = f"{len(self.methods)} parameters by {_ways(self.methods.values())}"
        return text if self.note is None else f"{text}; {self.note}"

    def __repr__(self) -> str:
        """Write the line, not every parameter of a large model."""
        return f"Coverage({self})"


def _ways(methods: Iterable[str]) -> str:
    """The ways once each; of many replayed modules the first and their number."""
    found = sorted(set(methods))
    replays = [way for way in found if way.startswith("replay of ")]
    if len(replays) > _LISTED_REPLAYS:
        rules = [way for way in found if way not in replays]
        more = f"{replays[0]} and of {len(replays) - 1} more modules"
        return ", ".join([*rules, more])
    return ", ".join(found)


@dataclass(frozen=True, slots=True)
class LayerReading:
    """One parameter's part of a reading.

    Attributes:
        name: The parameter's name.
        grad_sq_norm: Its part of the squared gradient norm [loss²/param²].
        variance_trace: Its part of ``tr Σ`` [loss²/param²].
        debiased_grad_sq_norm: Its part of ``|G|²``; may be negative [loss²/param²].
        simple_noise_scale: Of this parameter alone [examples, or tokens].
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
        estimator: How the noise was read, such as ``"per_example"``; where units are
            of ``b`` examples with it, as in ``"accumulation(b)"``; or ``"none"``.
        coverage: How each parameter was read, or why the noise was not.
        moments: Sufficient statistics of the noise; ``None`` where there are none.
        layer_moments: The same with one entry per parameter.
        layer_sq_norms: Squared norm of the mean gradient per parameter.
        example_sq_norms: ``|g_i|²`` per example of the step.
        estimates: By estimator, the reading's own first: sufficient statistics of the
            same step's noise.
        unit: What is counted as one: ``"example"`` or ``"sequence"``; with
            ``"token"`` noise scales are counted in tokens, while the sampling unit,
            and that of ``tr Σ``, is the sequence.
        tokens: Tokens that count behind this step's gradient, where those are asked
            for and known.
        clip_factor: What clipping has multiplied the gradient by, where it is known.
        quantities: What else was asked for, by its name in the vocabulary.
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
    estimates: Mapping[str, GradientMoments] = field(default_factory=dict)
    unit: str = "example"
    tokens: TokenCount | None = None
    clip_factor: Tensor | float | None = None
    quantities: Mapping[str, StepQuantity | HessianForms] = field(default_factory=dict)

    def __str__(self) -> str:
        """Write the step, the noise scale and its parts, a line each."""
        counted = "examples" if self.unit == "example" else "sequences"
        lines = [
            f"reading of step {self.step}, {self.batch_size} {counted}:",
            f"  |gradient|²: {self.grad_sq_norm}",
        ]
        if self.moments is not None:
            trace, norm, scale = self._finalised(self.moments)
            name = "scale in tokens" if self.unit == "token" else "scale"
            lines += [
                f"  tr Σ: {trace}",
                f"  |G|²: {norm}",
                f"  simple noise {name}: {scale}",
                f"  estimator: {self.estimator}",
            ]
        lines.append(f"  coverage: {self.coverage}")
        for name, reason in self.coverage.missing.items():
            lines.append(f"  no {name}: {reason}")
        if self.quantities:
            lines.append(f"  quantities: {', '.join(self.quantities)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Write the step only: values may still be on their device."""
        return (
            f"Reading(step={self.step}, batch_size={self.batch_size}, "
            f"estimator={self.estimator!r}, complete={self.coverage.complete})"
        )

    @property
    def grad_sq_norm(self) -> Estimate:
        """Squared norm of the mean gradient applied, before clipping [loss²/param²]."""
        return Estimate(float(self.layer_sq_norms.sum()))

    @property
    def variance_trace(self) -> Estimate:
        """``tr Σ`` per example, or sequence [loss²/param²]."""
        return self._finalised(self.moments)[0]

    @property
    def debiased_grad_sq_norm(self) -> Estimate:
        """``|G|²`` without the noise's part; may be negative [loss²/param²]."""
        return self._finalised(self.moments)[1]

    @property
    def simple_noise_scale(self) -> Estimate:
        """``tr Σ / |G|²`` of this step alone, with a wide interval [examples].

        With ``unit="token"`` it is counted in tokens: a batch of so many that count
        has as much noise as signal in its squared gradient norm.
        """
        return self._finalised(self.moments)[2]

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
        return self._finalised(None if moments is None else moments.layer(index))

    def noise(self, estimator: str) -> NoiseScale | None:
        """Return what one of the estimators says of this step alone.

        ``None`` where it has nothing to say; ``coverage.missing`` then says why.
        """
        moments = self.estimates.get(estimator)
        return None if moments is None else self._noise(moments)

    @property
    def _per_example(self) -> float:
        """What an example counts in noise scales; NaN where that is not known."""
        if self.unit != "token":
            return 1.0
        return math.nan if self.tokens is None else self.tokens.per_sequence

    def _finalised(
        self, moments: GradientMoments | None
    ) -> tuple[Estimate, Estimate, Estimate]:
        found = None if moments is None else self._noise(moments)
        if found is None:
            return _NOTHING, _NOTHING, _NOTHING
        return (
            found.variance_trace,
            found.debiased_grad_sq_norm,
            found.simple_noise_scale,
        )

    def _noise(self, moments: GradientMoments) -> NoiseScale | None:
        parts, counted = moments.parts(), self._per_example
        if parts is None:
            return None
        if math.isnan(counted):
            return replace(parts.noise_scale(), simple_noise_scale=_NOTHING)
        return parts.noise_scale(counted=counted)

    def row(self) -> dict[str, float | int | str]:
        """Return the reading as one flat row: values, sufficient statistics, status.

        The statistics of further estimators have their names in front, such as
        ``chunks_mean_sq_norm``; ``GradientMoments.from_columns`` reads them again.
        """
        trace, norm, scale = self._finalised(self.moments)
        row: dict[str, float | int | str] = {
            "step": self.step,
            "examples_seen": self.examples_seen,
            "batch_size": self.batch_size,
            "grad_sq_norm": self.grad_sq_norm.value,
            "variance_trace": trace.value,
            "debiased_grad_sq_norm": norm.value,
            "simple_noise_scale": scale.value,
            "unit": self.unit,
            **_columns(self.moments),
            "estimator": self.estimator,
            "coverage": float(self.coverage.complete),
            "status": str(scale.status),
        }
        if self.unit == "token":
            found = self.tokens
            row["tokens"] = math.nan if found is None else found.total
            row["tokens_per_sequence"] = self._per_example
        elif self.moments is not None and row["unit_size"] != 1.0:
            row["unit"] = "chunk"
        factor = self.clip_factor
        row["clip_factor"] = math.nan if factor is None else float(factor)
        # Every row of a run has the same columns, also for what is missing in a step.
        for name in (*list(self.estimates)[1:], *self.coverage.missing):
            if name in ESTIMATORS:
                columns = _columns(self.estimates.get(name))
                row |= {f"{name}_{column}": value for column, value in columns.items()}
        for name in self.coverage.missing:
            row |= dict.fromkeys(COLUMNS_OF.get(name, ()), math.nan)
        for name, quantity in self.quantities.items():
            row |= quantity.columns(name)
        return row


def _columns(moments: GradientMoments | None) -> dict[str, float | int]:
    """Sufficient statistics; of no units where there are none."""
    if moments is not None:
        return moments.columns()
    return {"num_units": 0, "num_read": 0, **dict.fromkeys(MOMENT_COLUMNS, math.nan)}
