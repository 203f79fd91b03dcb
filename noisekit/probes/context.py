"""What estimators and step metrics are set up with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from noisekit.core.risk import LossFn
from noisekit.probes.capture.example_weights import ExampleWeights
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import StepRecord
from noisekit.probes.capture.step_weights import (
    LossReduction,
    MicrobatchWeights,
    StepWeights,
)
from noisekit.probes.capture.tokens import TokenCounts

Shared = TypeVar("Shared")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeContext:
    """A probe's recorder and optimizer, and the conventions of the training loop.

    Attributes:
        recorder: Hooks the model.
        optimizer: Whose steps are read.
        loss_fn: The loss, where it is known.
        loss_reduction: What the loss does over its micro-batch.
        microbatch_weights: How the micro-batches' means make up the step's.
        example_weights: Maps targets to per-example loss weights.
        scaled: Whether the loop's gradient scaler is known.
        unit: What noise scales are counted in.
        tokens: Maps targets to the number of tokens that count.
        ghost_batch: Examples of a ghost batch, where those are replayed.
        generator: Draws rows and signs, on the CPU; never PyTorch's global one.
    """

    recorder: Recorder
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn | None = None
    loss_reduction: LossReduction = "mean"
    microbatch_weights: MicrobatchWeights = "equal"
    example_weights: ExampleWeights | None = None
    scaled: bool = False
    unit: str = "example"
    tokens: TokenCounts | None = None
    ghost_batch: int | None = None
    generator: torch.Generator = field(
        default_factory=lambda: torch.Generator().manual_seed(0)
    )
    _shared: dict[Callable[..., object], Any] = field(default_factory=dict)

    def shared(self, kind: "Callable[[ProbeContext], Shared]") -> Shared:
        """Return the one object of a kind that several step metrics read from."""
        if kind not in self._shared:
            self._shared[kind] = kind(self)
        found: Shared = self._shared[kind]
        return found

    def captures(self) -> tuple[Any, ...]:  # of whatever kinds were asked for
        """Return the shared objects."""
        return tuple(self._shared.values())

    def weights_of(self, record: StepRecord) -> StepWeights:
        """Return what the step's examples weigh under the loop's conventions."""
        return StepWeights.of(
            record.passes,
            self.loss_reduction,
            self.microbatch_weights,
            scaled=self.scaled,
        )

    def applied_factor(self, record: StepRecord) -> float | Tensor:
        """Return this rank's gradient in units of the mean gradient."""
        if self.loss_reduction != "sum":
            return 1.0
        return sum(self.weights_of(record).counts)
