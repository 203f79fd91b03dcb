"""A step's record turned into a reading, in the units of the mean gradient."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.step_record import StepRecord
from noisekit.probes.capture.step_weights import (
    LossReduction,
    MicrobatchWeights,
    StepWeights,
    scale_of_sum,
)
from noisekit.probes.capture.tokens import TokenCount
from noisekit.probes.estimators.calibration import Calibration
from noisekit.probes.estimators.choice import EstimatorOptions, Unit
from noisekit.probes.estimators.estimates import noise_of
from noisekit.probes.estimators.step_inputs import Evidence, StepNoise
from noisekit.probes.reading import Coverage, Reading

__all__ = [
    "FALLBACKS",
    "LossReduction",
    "MicrobatchWeights",
    "StepPosition",
    "assemble",
]

FALLBACKS = ("per_example", "ranks", "accumulation")
"""What "auto" tries, in this order; ranks are compared where none accumulates."""


@dataclass(frozen=True, slots=True)
class StepPosition:
    """Where in training a reading is taken."""

    step: int
    examples_seen: int


def assemble(
    record: StepRecord,
    position: StepPosition,
    coverage: dict[str, str],
    *,
    loss_reduction: LossReduction,
    microbatch_weights: MicrobatchWeights,
    loss_scale: Tensor | None,
    estimators: EstimatorOptions | None = None,
    calibration: Calibration | None = None,
    unit: Unit = "example",
    num_ranks: int = 1,
) -> Reading:
    """Return the reading of one optimiser step.

    Args:
        record: What the step's backward passes have left; has a gradient.
        position: Where in training.
        coverage: How each parameter's calls are read.
        loss_reduction: What the loss does over its micro-batch.
        microbatch_weights: How the micro-batches' means make up the step's.
        loss_scale: The factor of loss scaling that is in the gradients.
        estimators: Which were asked for; per-example where left out.
        calibration: What the normalisation layers stand for.
        unit: What is counted as one.
        num_ranks: Processes over which the reading will be summed.
    """
    assert record.gradient is not None
    scale = scale_of(record, loss_scale, loss_reduction)
    evidence = Evidence(
        record,
        record.gradient * scale,
        scale,
        coverage,
        StepWeights.of(record.passes, loss_reduction, microbatch_weights),
        estimators or EstimatorOptions(),
        calibration or Calibration(),
        num_ranks,
    )
    found, missing = _estimates(evidence)
    return _reading(evidence, position, found, missing, unit)


def scale_of(
    record: StepRecord, loss_scale: Tensor | None, loss_reduction: LossReduction
) -> Tensor | float:
    """Factor that brings a record's squared norms to those of a mean loss."""
    scale: Tensor | float = 1.0
    if loss_scale is not None and record.gradient is not None:
        # In the gradient's own precision.
        scale = loss_scale.to(record.gradient.dtype).pow(-2)
    return scale * scale_of_sum(record.passes, loss_reduction, record.num_examples)


def _estimates(
    evidence: Evidence,
) -> tuple[dict[str, StepNoise], dict[str, str]]:
    """What every estimator that was asked for says, and why others say nothing."""
    found: dict[str, StepNoise] = {}
    missing: dict[str, str] = {}
    for asked in evidence.options.names:
        for name in FALLBACKS if asked == "auto" else (asked,):
            noise = noise_of(name, evidence)
            if isinstance(noise, StepNoise):
                found.setdefault(name, noise)
                break
            # Of "auto" the first reason counts: that examples have no readings.
            missing.setdefault(asked, noise)
    return found, {name: why for name, why in missing.items() if name not in found}


def _reading(
    evidence: Evidence,
    position: StepPosition,
    found: Mapping[str, StepNoise],
    missing: Mapping[str, str],
    unit: Unit,
) -> Reading:
    asked = evidence.options.own
    own = _own(asked, found)
    others = {name: why for name, why in missing.items() if name != asked}
    tokens = None
    if unit == "token":
        counts = [p.tokens for p in evidence.passes]
        counted = TokenCount.of(counts, evidence.weights, evidence.gradient)
        if isinstance(counted, TokenCount):
            tokens = counted
        else:
            others["tokens"] = counted
    if own is None:
        reason = missing.get(asked, "")
        shown = Coverage(evidence.coverage, reason, None, others)
    else:
        shown = Coverage(own.methods, None, own.note, others)
    moments: dict[str, GradientMoments] = {}
    if own is not None:
        moments[own.name] = own.moments
    moments |= {name: noise.moments for name, noise in found.items()}
    return Reading(
        position.step,
        position.examples_seen,
        evidence.record.num_examples,
        "none" if own is None else own.label,
        shown,
        None if own is None else own.moments,
        None if own is None else own.layer_moments,
        evidence.gradient,
        None if own is None else own.example_sq_norms,
        moments,
        unit,
        tokens,
    )


def _own(asked: str, found: Mapping[str, StepNoise]) -> StepNoise | None:
    names = FALLBACKS if asked == "auto" else (asked,)
    return next((found[name] for name in names if name in found), None)
