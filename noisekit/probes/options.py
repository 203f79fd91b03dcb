"""The options of a probe: documented, given their defaults and checked in one place."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from annotated_types import Ge, Gt, Le

from noisekit.core.errors import UsageError
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import LossFn
from noisekit.core.settings import (
    CheckedElsewhere,
    Fraction,
    PositiveInt,
    check_settings,
)
from noisekit.core.vocabulary import EstimatorName, QuantityName
from noisekit.probes.capture.example_weights import ExampleWeights
from noisekit.probes.capture.hooks import OnError
from noisekit.probes.capture.step_weights import LossReduction, MicrobatchWeights
from noisekit.probes.capture.tokens import TokenCounts, refusal_of_tokens
from noisekit.probes.estimators.estimator import NoiseEstimator
from noisekit.probes.estimators.estimator_set import ESTIMATORS
from noisekit.probes.step_metrics.metric import StepMetric
from noisekit.probes.step_metrics.metric_set import METRICS

Unit = Literal["example", "sequence", "token"]
Estimator = Literal["auto"] | EstimatorName | NoiseEstimator
Metric = QuantityName | StepMetric

Kind = TypeVar("Kind", NoiseEstimator, StepMetric)
T = TypeVar("T")

_Made = Annotated[T, CheckedElsewhere()]
"""Names and instances, which are checked against their tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """How a probe reads a training loop: the options of ``nk.attach``.

    Attributes:
        loss_fn: The loss. Needed by ``estimator="ghost"``, by ``Probe.measure`` and by
            the quantities ``"cabs"`` and ``"hessian_noise_scale"``; unless it is a
            module, call it through ``Probe.loss_fn`` in the loop.
        every: Take a reading every ``every`` optimizer steps, starting with the first;
            or a function of the step's number that says whether, the same on every
            rank.
        estimator: How the noise is estimated, or several estimators to read side by
            side on each step; the first is the reading's own. ``"per_example"``, and
            cheaper ``"rows"`` and ``"chunks"``, raise where examples are coupled, as
            by BatchNorm in training mode. ``"accumulation"`` and ``"ranks"`` compare
            micro-batches and processes, whatever the model; ``"ghost"`` replays parts
            of the batch. ``"random_signs"`` takes one more backward pass.
            ``"norm_layers"`` is a proxy. ``"preconditioned"`` adds Adam's noise to
            another. ``"auto"`` takes per-example norms, else ranks, else micro-batches.
            A ``NoiseEstimator`` of your own may stand in place of a name.
        row_share: Share of the examples that ``"rows"`` draws at random.
        num_chunks: Parts of the batch for ``"chunks"`` and, in each half of it, for
            the quantity ``"hessian_noise_scale"``.
        num_signs: Extra backward passes for ``"random_signs"``.
        calibrate_every: Readings between two full readings by which ``"norm_layers"``
            is calibrated; never by default.
        generator: Draws rows and signs, on the CPU; seeded with 0 by default. Its
            state is part of the probe's.
        ghost_batch: Examples of a ghost batch.
        example_weights: Maps a micro-batch's targets to per-example loss weights.
            Needed only for a custom loss with unequal weights, which then has to be
            called through ``Probe.loss_fn``.
        loss_reduction: What the loss does over the batch, ``"mean"`` or ``"sum"``.
        microbatch_weights: With accumulation of means: ``"equal"`` where each
            micro-batch has the same factor (``loss / k``), ``"by_size"`` where it has
            its share of the examples. They differ for unequal micro-batches only.
        batch_dim: Axis of the examples in the model's input.
        unit: What the batch's entries are, ``"example"`` or ``"sequence"``; with
            ``"token"`` they are sequences, and noise scales are counted in tokens.
        tokens: With ``unit="token"``: maps a micro-batch's targets to the number of
            tokens that count in each sequence. Not needed for PyTorch's cross-entropy
            in ``loss_fn``, nor without ``loss_fn`` where all positions of the model's
            only input count. Where a custom loss is a mean over tokens, give
            ``example_weights`` too.
        params: Names or patterns of the parameters to read, among those that the
            optimizer updates; all of these by default.
        scaler: The loop's gradient scaler; a step that it skips gives no reading.
        exact_bits: Keep the bits of the training. Otherwise faster kernels that round
            differently may be used.
        on_error: What becomes of an error inside the probe while training: ``"warn"``
            ends the step's reading with the reason in its coverage and one warning,
            ``"raise"`` lets it out of the training's own forward or backward pass.
        quantities: Step metrics, computed from the same backward pass: names such as
            ``"norm_test"`` or ``"gsnr"`` (``QuantityName`` has all), or a
            ``StepMetric`` of your own. Values are in ``Reading.quantities``; why one
            is missing is in the coverage. ``"gsnr"``, ``"evidence_stopping"``,
            ``"update_size"`` and ``"distance_from_start"`` hold one more copy of the
            parameters each, ``"gradient_cosine"`` two, ``"hessian_noise_scale"``
            ``num_chunks + 6``.
        hessian_every: Readings between two with ``"hessian_noise_scale"``.
        budget: Share of the training time that readings may cost, such as 0.03. The
            probe times itself and picks the steps; see ``Probe.overhead``.
        repeatable: Require that a rerun reads the same steps (needed when readings
            drive a batch-size policy); refuses ``budget``.
        sinks: Called with every reading.
    """

    loss_fn: LossFn | None = None
    every: PositiveInt | Callable[[int], bool] = 1
    estimator: _Made[Estimator | tuple[Estimator, ...]] = "auto"
    row_share: Annotated[float, Gt(0), Le(1)] = 0.25
    num_chunks: Annotated[int, Ge(2)] = 4
    num_signs: PositiveInt = 1
    calibrate_every: PositiveInt | None = None
    generator: torch.Generator | None = None
    ghost_batch: PositiveInt | None = None
    example_weights: ExampleWeights | None = None
    loss_reduction: LossReduction = "mean"
    microbatch_weights: MicrobatchWeights = "equal"
    batch_dim: int = 0
    unit: Unit = "example"
    tokens: TokenCounts | None = None
    params: ParameterPatterns = None
    scaler: "torch.amp.GradScaler | None" = None
    exact_bits: bool = True
    on_error: OnError = "warn"
    quantities: _Made[Metric | Iterable[Metric]] = ()
    hessian_every: PositiveInt = 100
    budget: Fraction | None = None
    repeatable: bool = False
    sinks: Iterable[Callable[[Any], object]] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without the model.

        Raises:
            UsageError: With what is possible instead.
        """
        check_settings(self)
        uncounted = refusal_of_tokens(self.unit, self.tokens, self.loss_fn)
        if uncounted is not None:
            raise UsageError(uncounted)
        if self.example_weights is not None and self.loss_fn is None:
            raise UsageError(
                "example_weights= needs the loss to be seen, got loss_fn=None; give it "
                "to attach() and call it through probe.loss_fn."
            )
        self._check_budget()

    def _check_budget(self) -> None:
        """Check that the clock may decide which steps are read."""
        budget = self.budget
        if budget is None:
            return
        if self.every != 1:
            raise UsageError(
                f"budget={budget} and every={self.every} both say which steps are "
                "read; give one of them."
            )
        reason = ""
        if self.repeatable:
            reason = "repeatable=True promises the same steps on a second run"
        elif torch.are_deterministic_algorithms_enabled():
            reason = "deterministic algorithms promise that a second run is the same"
        if reason:
            raise UsageError(
                f"budget needs steps that the clock may choose, got a run where "
                f"{reason}; use every=."
            )

    def estimators(self) -> tuple[NoiseEstimator, ...]:
        """Return the estimators that were asked for, new ones for names.

        Raises:
            UsageError: If a name is unknown or a setting out of range.
        """
        chosen = self.estimator
        several = chosen if isinstance(chosen, tuple | list) else (chosen,)
        return tuple(
            self._made(one, NoiseEstimator, ESTIMATORS, "estimator") for one in several
        )

    def metrics(self) -> tuple[StepMetric, ...]:
        """Return the step metrics that were asked for, new ones for names.

        Raises:
            UsageError: If a name is unknown or a setting out of range.
        """
        chosen = self.quantities
        several: Iterable[object] = (chosen,)
        if isinstance(chosen, Iterable) and not isinstance(chosen, str):
            several = chosen
        return tuple(
            self._made(one, StepMetric, METRICS, "quantities") for one in several
        )

    def _made(self, chosen: object, base: type[Kind], table: Any, option: str) -> Kind:
        """An instance as it is; of a name, the table's class with its settings."""
        if isinstance(chosen, base):
            return chosen
        kind: type[Kind] | None = table.get(chosen) if isinstance(chosen, str) else None
        if kind is None:
            listed = ", ".join(repr(name) for name in table)
            raise UsageError(
                f"{option} needs to be one of {listed}, or a {base.__name__} of your "
                f"own, got {chosen!r}."
            )
        return kind(**{name: getattr(self, name) for name in kind.settings})


def check_unit(unit: str) -> None:
    """Check that noise scales can be counted in ``unit``.

    Raises:
        UsageError: With what they can.
    """
    if unit not in get_args(Unit):
        listed = "'example', 'sequence' or 'token'"
        raise UsageError(f"unit needs to be {listed}, got {unit!r}.")
