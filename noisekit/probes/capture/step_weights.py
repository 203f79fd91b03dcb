"""What every example, chunk and micro-batch of a step weighs in its gradient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from noisekit.core.layers.chunks import chunk_slices
from noisekit.probes.capture.loss_counts import LossCounts
from noisekit.probes.capture.step_record import ForwardPass

LossReduction = Literal["mean", "sum"]
MicrobatchWeights = Literal["equal", "by_size"]
Number = float | Tensor


@dataclass(frozen=True)
class StepWeights:
    """The weights ``w_i`` in the step's mean gradient, ``sum w_i = 1``.

    Attributes:
        passes: The step's micro-batches.
        alike: Whether an example weighs the same whatever its micro-batch's size.
    """

    passes: Sequence[ForwardPass]
    alike: bool

    @classmethod
    def of(
        cls,
        passes: Sequence[ForwardPass],
        loss_reduction: LossReduction,
        microbatch_weights: MicrobatchWeights,
        *,
        scaled: bool = False,
    ) -> "StepWeights":
        """Return the weights under the loop's conventions.

        Args:
            passes: The step's micro-batches.
            loss_reduction: What the loss does over its micro-batch.
            microbatch_weights: How the micro-batches' means make up the step's.
            scaled: Whether a gradient scaler is known to multiply the loss.
        """
        for forward_pass in passes:
            if loss_reduction == "mean":
                by_size = microbatch_weights == "by_size"
                _settle(forward_pass, len(passes), by_size=by_size, scaled=scaled)
        alike = loss_reduction == "sum" or microbatch_weights == "by_size"
        return cls(passes, alike)

    @property
    def sizes(self) -> list[int]:
        """Examples of every micro-batch."""
        return [forward_pass.num_examples or 0 for forward_pass in self.passes]

    @cached_property
    def counts(self) -> list[Number]:
        """What the examples of every micro-batch count together in the loss."""
        return [
            float(p.num_examples or 0) if p.weights is None else p.weights.sum()
            for p in self.passes
        ]

    @cached_property
    def factors(self) -> list[Number]:
        """What an example's own count is multiplied by to give its weight."""
        if self.alike:
            total = sum(self.counts)
            return [1.0 / total] * len(self.passes)
        return [1.0 / (count * len(self.passes)) for count in self.counts]

    @cached_property
    def example_sq_sum(self) -> Number:
        """``sum w_i²`` over all examples."""
        return sum(
            factor**2 * (n if p.weights is None else p.weights.square().sum())
            for factor, n, p in zip(self.factors, self.sizes, self.passes, strict=True)
        )

    def of_examples(self) -> list[Number]:
        """``w_i`` by micro-batch: one number, or one per example."""
        return [
            factor if p.weights is None else factor * p.weights
            for factor, p in zip(self.factors, self.passes, strict=True)
        ]

    def of_microbatches(self) -> list[Number]:
        """The weight of every micro-batch."""
        return [f * c for f, c in zip(self.factors, self.counts, strict=True)]

    def of_chunks(self, num_chunks: int) -> list[Number]:
        """The weight of every chunk of every micro-batch."""
        found: list[Number] = []
        for factor, n, p in zip(self.factors, self.sizes, self.passes, strict=True):
            for rows in chunk_slices(n, num_chunks):
                size = float(rows.stop - rows.start)
                own = size if p.weights is None else p.weights[rows].sum()
                found.append(factor * own)
        return found

    @property
    def note(self) -> str | None:
        """What a reader must know of the examples and their weights."""
        sizes = self.sizes
        notes = [note for p in self.passes for note in p.notes]
        if not self.alike and len(set(sizes)) > 1:
            notes.append(
                f"micro-batches of {min(sizes)} to {max(sizes)} examples weigh the same"
            )
        return "; ".join(dict.fromkeys(notes)) or None


def _settle(
    forward_pass: ForwardPass, num_passes: int, *, by_size: bool, scaled: bool
) -> None:
    """Let what the outputs' gradient tells decide what the examples of a pass weigh.

    A call of the loss may belong to another pass, to a log or to a mean of the loop's
    own; the gradient is the step's. Weights whose sum is not that of a mean belong to
    the examples' losses, which count alike.
    """
    counts, forward_pass.counts = forward_pass.counts, None
    source, weights = forward_pass.weights_from, forward_pass.weights
    if source == "given":
        return
    if counts is None:
        if weights is not None and source != "mean":
            forward_pass.weights = None
            forward_pass.notes.append(
                f"what examples weigh is not known of reduction={source!r}; give "
                "example_weights= if they do not weigh alike"
            )
    elif counts.equal:
        forward_pass.weights = None
        unusual = _scale_note(counts, num_passes)
        if unusual and not scaled:
            forward_pass.notes.append(unusual)
    elif weights is not None and source == "mean" and counts.is_proportional(weights):
        return  # the same, without rounding
    elif counts.is_of_mean(num_passes, by_size=by_size):
        n = len(counts.values)
        forward_pass.weights = counts.values * (n / counts.total)
    else:
        forward_pass.weights = None
        forward_pass.notes.append(
            "examples' losses count unequally, and not as in a weighted mean; each "
            "example is taken to weigh alike"
        )


_LEAST_SCALE = 2**7
"""A gradient scaler begins at 65,536 and halves where a step overflows."""


def _scale_note(counts: LossCounts, num_passes: int) -> str:
    """That a loss is no mean although its examples count alike, where that shows."""
    n = len(counts.values)
    if n > 1 and counts.is_multiple(n, num_passes):
        return (
            "the loss sums over the examples, and gradient norms are those of the sum; "
            "pass loss_reduction='sum' for those of the mean"
        )
    total = counts.total * num_passes
    scale = 2.0 ** round(math.log2(total))
    if scale >= _LEAST_SCALE and counts.is_multiple(scale, num_passes):
        return (
            f"the loss is multiplied by {scale:,.0f}, as by a gradient scaler, and so "
            "are gradient norms; pass scaler="
        )
    return ""


def sq_sum(weights: Sequence[Number]) -> Number:
    """``sum w_k²``; a plain number where the weights are."""
    return sum(weight * weight for weight in weights)


def scale_of_sum(
    passes: Sequence[ForwardPass], loss_reduction: LossReduction, num_examples: int
) -> Number:
    """Factor that makes squared norms of a summed loss's gradient those of a mean."""
    if loss_reduction != "sum":
        return 1.0
    counts = [
        float(p.num_examples or 0) if p.weights is None else p.weights.sum()
        for p in passes
    ]
    total = sum(counts)
    if isinstance(total, Tensor):
        return total.clamp(min=torch.finfo(total.dtype).tiny).pow(-2)
    return float(max(1, num_examples)) ** -2
