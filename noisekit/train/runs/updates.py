"""One optimizer step: examples, rate, settings and gradient, as planned."""

import torch
from torch import Tensor

from noisekit.core.risk import LossFn
from noisekit.train.data.batch_order import BatchOrder
from noisekit.train.data.section import TensorPair
from noisekit.train.recipes.optimizers import Settings
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.update_plan import PlannedUpdate
from noisekit.train.runs.state import TrainState


class Updates:
    """Fills gradients and sets the optimizer, each a function of the plan alone."""

    def __init__(self, spec: RunSpec, train: TensorPair, loss_fn: LossFn) -> None:
        self._train = train
        self._loss_fn = loss_fn
        self._order = BatchOrder(
            spec.seed,
            num_examples=len(train),
            device=spec.compute.device,
            order=0 if spec.start is None else spec.start.order,
        )
        self._settings: Settings = {}

    def gradient(self, state: TrainState, planned: PlannedUpdate) -> Tensor:
        """Fill ``.grad`` for an update, set the optimizer, and return the loss."""
        groups = state.optimizer.param_groups
        for group in groups:
            group["lr"] = planned.learning_rate
        if planned.settings is not self._settings:
            self._settings = planned.settings
            for group in groups:
                group.update(self._settings)
        state.optimizer.zero_grad()
        chosen = self._order.indices(planned.begin, planned.num_examples)
        return self._backward(state, chosen, planned.microbatch)

    def _backward(
        self, state: TrainState, chosen: Tensor, microbatch: int | None
    ) -> Tensor:
        """Sum the gradients of micro-batches, weighted to the mean over the batch."""
        size = microbatch or len(chosen)
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
