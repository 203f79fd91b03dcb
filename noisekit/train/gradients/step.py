"""The gradient of one update, and what rules need to compute others beside it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisekit.core.risk import LossFn
from noisekit.probes.capture.hooks import suspend_recording
from noisekit.train.data.update_batches import Microbatch, UpdateBatch
from noisekit.train.models.random_layers import seeded_draws


@dataclass(frozen=True, slots=True)
class GradientStep:
    """One update: its weights, examples and random streams.

    Attributes:
        model: The model, in training mode.
        loss_fn: The loss, as a mean over a batch's examples.
        optimizer: The optimizer that will apply the gradient.
        batch: The examples.
        draws: Names of the stream of what layers draw, such as the seed and the
            update; ``None`` where no layer draws.
    """

    model: nn.Module
    loss_fn: LossFn
    optimizer: torch.optim.Optimizer
    batch: UpdateBatch
    draws: tuple[int | str, ...] | None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that have gradients."""
        return tuple(p for p in self.model.parameters() if p.requires_grad)

    def backward(self) -> Tensor:
        """Add the gradient of the mean loss over the batch to ``.grad``; return it.

        Gradients of micro-batches are weighted by their numbers of examples.
        """
        losses = []
        for part in self.batch:
            loss = self.loss(part)
            if len(self.batch) > 1:
                loss = loss * part.share
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def loss(self, part: Microbatch, inputs: Tensor | None = None) -> Tensor:
        """Return the mean loss over a micro-batch, or over other inputs in its place.

        Layers draw the same in all passes over one micro-batch of an update.
        """
        with self._drawing(part):
            outputs = self.model(part.inputs if inputs is None else inputs)
        return self.loss_fn(outputs, part.targets)

    def gradient(self, part: Microbatch, inputs: Tensor | None = None) -> list[Tensor]:
        """Return the gradient of ``loss``; ``.grad`` stays as it is."""
        loss = self.loss(part, inputs)
        found = torch.autograd.grad(
            loss, self.parameters, allow_unused=True, materialize_grads=True
        )
        return list(found)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Compute beside the update: no probe records, and buffers stay.

        Running statistics of BatchNorm move once per update and micro-batch, by the
        pass that gives the update's own gradient.
        """
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with suspend_recording():
                yield
        finally:
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)

    def _drawing(self, part: Microbatch) -> AbstractContextManager[None]:
        if self.draws is None:
            return nullcontext()
        return seeded_draws(*self.draws, part.number, device=part.inputs.device)
