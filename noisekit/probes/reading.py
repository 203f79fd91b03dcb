"""Gradient and gradient noise of one optimizer step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.results import Estimate, Status
from noisekit.noise.moments import MOMENT_COLUMNS, GradientMoments
from noisekit.noise.scale import NoiseScale
from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.probes.capture.tokens import TokenCount

_LISTED_REPLAYS = 3
_LISTED_UNREAD = 3


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which parameters the noise was read of, how, and why not of others.

    Attributes:
        methods: By parameter: a layer's rule, or the replay of a module, and for other
            estimators than per-example what was made of it.
        reason: Why the step has no noise; ``None`` where it has.
        note: What a reader must know of the reading, such as unequal micro-batches.
        missing: By estimator beside the reading's own, and by quantity, that was asked
            for and is missing in this step: why.
        unread: By parameter that the noise does not cover: why.
        share_of_params: Share of the parameters' elements that it covers.
        way_out: What to do for a noise that is missing, where the reason does not tell.
    """

    methods: Mapping[str, str]
    reason: str | None = None
    note: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    share_of_params: float = 1.0
    way_out: str | None = None

    @property
    def why_missing(self) -> str | None:
        """Why the step has no noise, and what to do; ``None`` where it has."""
        if self.reason is None or self.way_out is None:
            return self.reason
        return f"{self.reason}; {self.way_out}"

    @property
    def complete(self) -> bool:
        """Whether the noise was read, of all parameters."""
        return self.reason is None and not self.unread

    def __str__(self) -> str:
        """Write it in one line."""
        if self.reason is not None:
            return f"no noise: {self.why_missing}"
        count, read = len(self.methods), dict(self.methods)
        for name in self.unread:
            read.pop(name, None)
        of = "" if len(read) == count else f" of {count}"
        text = f"{len(read)}{of} parameters by {_ways(read.values())}"
        if self.unread:
            text += f"; {_unread(self.unread)}"
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


def _unread(reasons: Mapping[str, str]) -> str:
    """The parameters that were left out, of many the first, and the first reason."""
    names = list(reasons)
    more = len(names) - _LISTED_UNREAD
    listed = ", ".join(names[:_LISTED_UNREAD]) + (
        f" and {more} more" if more > 0 else ""
    )
    return f"not read: {listed} ({reasons[names[0]]})"


@dataclass(frozen=True, slots=True)
class ShareRead:
    """How much of the model a reading's noise covers.

    Attributes:
        params: Share of the parameters' elements.
        grad_sq_norm: Share of the squared gradient norm.
    """

    params: float
    grad_sq_norm: float


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
    """Gradient and gradient noise of one optimizer step.

    Values stay on the training device until they are asked for; then one small
    transfer makes them Python numbers.

    Attributes:
        step: Optimizer steps taken, this one included.
        examples_seen: Examples that entered a gradient, this step's included.
        batch_size: Examples behind this step's gradient.
        estimator: How the noise was read, such as ``"per_example"``; where units are
            of ``b`` examples with it, as in ``"accumulation(b)"``; or ``"none"``.
        coverage: Which parameters the noise was read of, how, and why not of others.
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
        quantities: Step metrics that were asked for, by the names of their values.
        of_step_gradient: Whether the noise is that of the step's own gradient, not of
            a proxy or of the preconditioned gradient.
        blank: Columns of all estimators and metrics beside the reading's own, empty:
            a row has them also where one is missing in this step.
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
    of_step_gradient: bool = True
    blank: Mapping[str, float | int] = field(default_factory=dict)

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
    def share_read(self) -> ShareRead:
        """How much of the model the noise covers; nothing where there is none."""
        if self.moments is None:
            return ShareRead(0.0, 0.0)
        unread = self.coverage.unread
        if not unread:
            return ShareRead(1.0, 1.0)
        norms = dict(
            zip(self.coverage.methods, self.layer_sq_norms.tolist(), strict=True)
        )
        whole, left_out = sum(norms.values()), sum(norms[name] for name in unread)
        share = 1 - left_out / whole if whole > 0 else math.nan
        return ShareRead(self.coverage.share_of_params, share)

    @property
    def status(self) -> Status:
        """Whether the noise of this step can be relied on."""
        return self.simple_noise_scale.status

    @property
    def layers(self) -> tuple[LayerReading, ...]:
        """The reading parameter by parameter."""
        norms = self.layer_sq_norms.tolist()
        return tuple(
            LayerReading(name, Estimate(norm), *self._layer(index, name))
            for index, (name, norm) in enumerate(
                zip(self.coverage.methods, norms, strict=True)
            )
        )

    def _layer(self, index: int, name: str) -> tuple[Estimate, Estimate, Estimate]:
        if name in self.coverage.unread:
            return (_unavailable(self.coverage.unread[name]),) * 3
        moments = self.layer_moments
        return self._finalised(None if moments is None else moments.layer(index))

    @checked
    def noise(self, estimator: str) -> NoiseScale | None:
        """Return the noise of this step alone by one of the estimators.

        ``None`` where it has none; ``coverage.missing`` then says why.
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
        noise = None if moments is None else self._noise(moments)
        if noise is None:
            reason = self.coverage.why_missing or "noise needs 2 units in a step"
            return (_unavailable(reason),) * 3
        return (
            noise.variance_trace,
            noise.debiased_grad_sq_norm,
            noise.simple_noise_scale,
        )

    def _noise(self, moments: GradientMoments) -> NoiseScale | None:
        parts, counted = moments.parts(), self._per_example
        if parts is None:
            return None
        if not parts.finite:
            nothing = _unavailable("the gradient is not finite")
            return NoiseScale(nothing, nothing, nothing)
        if math.isnan(counted):
            nothing = _unavailable(self.coverage.missing.get("tokens", ""))
            return replace(parts.noise_scale(), simple_noise_scale=nothing)
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
            "coverage": self.share_read.params,
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
        row |= self.blank
        own = self.estimator.partition("(")[0]
        for name, moments in self.estimates.items():
            if name != own:
                row |= estimator_columns(name, moments)
        for name, quantity in self.quantities.items():
            row |= quantity.columns(name)
        return row


def _unavailable(reason: str) -> Estimate:
    return Estimate(math.nan, status=Status.UNAVAILABLE, note=reason or None)


def estimator_columns(
    name: str, moments: GradientMoments | None
) -> dict[str, float | int]:
    """Return the statistics of an estimator beside a reading's own, by column."""
    return {f"{name}_{column}": value for column, value in _columns(moments).items()}


def _columns(moments: GradientMoments | None) -> dict[str, float | int]:
    """Sufficient statistics; of no units where there are none."""
    if moments is not None:
        return moments.columns()
    return {"num_units": 0, "num_read": 0, **dict.fromkeys(MOMENT_COLUMNS, math.nan)}
