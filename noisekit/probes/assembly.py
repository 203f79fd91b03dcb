"""A step's record turned into a reading, in the units of the mean gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from noisekit.noise.moments import GradientMoments
from noisekit.probes.passes import ForwardPass, StepRecord
from noisekit.probes.reading import Coverage, Reading

LossReduction = Literal["mean", "sum"]
MicrobatchWeights = Literal["equal", "by_size"]


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
) -> Reading:
    """Return the reading of one optimiser step.

    Args:
        record: What the step's backward passes have left; has a gradient.
        position: Where in training.
        coverage: How each parameter is read.
        loss_reduction: What the loss does over its micro-batch.
        microbatch_weights: How the micro-batches' means make up the step's.
        loss_scale: The factor of loss scaling that is in the gradients.
    """
    assert record.gradient is not None
    scale: Tensor | float = 1.0 if loss_scale is None else loss_scale.pow(-2)
    if loss_reduction == "sum":
        scale = scale / max(1, record.num_examples) ** 2
    gradient = record.gradient * scale
    ghosts = [p.ghost for p in record.passes if p.ghost is not None]
    if ghosts:
        note = "of the last micro-batch" if len(record.passes) > 1 else None
        way = f"ghost batches of {ghosts[-1].unit_size}"
        replayed = Coverage(dict.fromkeys(coverage, way), None, note)
        return _reading(record, position, replayed, gradient, ghosts[-1])
    reason = _reason(record)
    if reason is not None:
        return _reading(record, position, Coverage(coverage, reason), gradient, None)
    sizes = [p.num_examples or 0 for p in record.passes]
    alike = loss_reduction == "sum" or microbatch_weights == "by_size"
    weights = [1.0 if alike else 1.0 / size for size in sizes]
    note = None
    if len(set(weights)) > 1:
        note = f"micro-batches of {min(sizes)} to {max(sizes)} examples weigh the same"
    return _per_example(
        record, position, Coverage(coverage, None, note), gradient, scale, weights
    )


def _reason(record: StepRecord) -> str | None:
    """Why the record tells nothing of the noise, if so."""
    faults = [*record.faults, *(f for p in record.passes for f in p.faults)]
    if faults:
        return faults[0]
    if not record.passes:
        return "the model's own forward was not called in this step"
    if any(p.inputs is not None for p in record.passes):
        return "the loss was not called through probe.loss_fn"
    if any(p.num_examples is None or not p.sq_norms for p in record.passes):
        return "the model's input has no tensor with a batch axis"
    if record.num_examples < 2:
        return f"noise needs 2 examples per step, got {record.num_examples}"
    return None


def _per_example(
    record: StepRecord,
    position: StepPosition,
    coverage: Coverage,
    gradient: Tensor,
    scale: Tensor | float,
    weights: Sequence[float],
) -> Reading:
    """``weights`` are those of one example of each pass, up to a common factor."""
    tables = [_table(p, gradient) * scale for p in record.passes]  # (Q, n) each
    sizes = [table.shape[1] for table in tables]
    total = sum(w * n for w, n in zip(weights, sizes, strict=True))
    shares = [w / total for w in weights]  # w_i: they sum to one
    weight_sq_sum = sum(w**2 * n for w, n in zip(shares, sizes, strict=True))
    by_example = [table.sum(0) for table in tables]
    table, examples = _joined(tables, 1), _joined(by_example, 0)
    layer_moments = GradientMoments(
        table.shape[1], 1, weight_sq_sum, table.sum(1), table.square().sum(1), gradient
    )
    moments = GradientMoments(
        table.shape[1],
        1,
        weight_sq_sum,
        examples.sum(),
        examples.square().sum(),
        gradient.sum(),
    )
    own = [part / share**2 for part, share in zip(by_example, shares, strict=True)]
    return Reading(
        position.step,
        position.examples_seen,
        record.num_examples,
        "per_example",
        coverage,
        moments,
        layer_moments,
        gradient,
        _joined(own, 0),
    )


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _table(forward_pass: ForwardPass, like: Tensor) -> Tensor:
    """``|u_i|²`` of every parameter; zero for those that the pass did not use."""
    found = forward_pass.sq_norms
    unused = torch.zeros_like(next(iter(found.values())))
    rows = [found.get(index, unused) for index in range(len(like))]
    return torch.stack([row.to(like.dtype) for row in rows])


def _reading(
    record: StepRecord,
    position: StepPosition,
    coverage: Coverage,
    gradient: Tensor,
    ghost: GradientMoments | None,
) -> Reading:
    return Reading(
        position.step,
        position.examples_seen,
        record.num_examples,
        "none" if ghost is None else f"ghost({ghost.unit_size})",
        coverage,
        ghost,
        None,
        gradient,
        None,
    )
