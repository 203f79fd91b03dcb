"""One optimizer step: batch size, examples, rate and gradient, read off the clock."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from noisekit.core.risk import LossFn
from noisekit.train.data.batch_order import BatchOrder
from noisekit.train.data.section import TensorPair
from noisekit.train.recipes.clock import Position
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.state import TrainState


class BatchSizePolicy(Protocol):
    """What decides how many examples an update sees."""

    def batch_size(self, position: Position) -> int:
        """Return the batch size of the update that begins at ``position``."""
        ...


@dataclass(frozen=True, slots=True)
class ConstantBatchSize:
    """The same batch size throughout.

    Attributes:
        size: Examples per update.
    """

    size: int

    def batch_size(self, position: Position) -> int:
        """Return the one size."""
        return self.size


class Updates:
    """Takes optimizer steps, each a function of the position and the seed.

    Attributes:
        learning_rate: Rate of the last update; that of the first one before it.
    """

    def __init__(self, spec: RunSpec, train: TensorPair, loss_fn: LossFn) -> None:
        self._train = train
        self._loss_fn = loss_fn
        self._clock = spec.clock
        self._policy: BatchSizePolicy = ConstantBatchSize(spec.training.batch_size)
        self._microbatch = spec.training.microbatch
        self._base_rate = spec.optimizer.learning_rate
        self._factor = spec.schedule.factor(self._clock)
        self._order = BatchOrder(
            spec.seed, num_examples=len(train), device=spec.compute.device
        )
        self.learning_rate = self._rate(Position())

    def gradient(self, state: TrainState) -> tuple[Tensor, Position]:
        """Fill ``.grad`` for the update at ``state.position``, and set its rate.

        Returns:
            The batch's loss, and the position after the update.
        """
        batch_size = self._policy.batch_size(state.position)
        begin, after = self._clock.update(state.position, batch_size)
        self.learning_rate = self._rate(state.position)
        for group in state.optimizer.param_groups:
            group["lr"] = self.learning_rate
        state.optimizer.zero_grad()
        chosen = self._order.indices(begin, after.examples - state.position.examples)
        return self._backward(state, chosen), after

    def _rate(self, position: Position) -> float:
        return self._base_rate * self._factor(position)

    def _backward(self, state: TrainState, chosen: Tensor) -> Tensor:
        """Sum the gradients of micro-batches, weighted to the mean over the batch."""
        size = self._microbatch or len(chosen)
        parts = (chosen,) if size >= len(chosen) else torch.split(chosen, size)
        losses = []
        for part in parts:
            outputs = state.model(self._train.inputs.index_select(0, part))
            loss = self._loss_fn(outputs, self._train.targets.index_select(0, part))
            if len(parts) > 1:
                loss = loss * (len(part) / len(chosen))
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
