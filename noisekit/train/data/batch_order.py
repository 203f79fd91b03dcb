"""Which examples each update sees: a function of the seed and the update alone."""

import torch
from torch import Tensor

from noisekit.core.randomness import stream
from noisekit.train.recipes.run_spec import RunSpec


class BatchOrder:
    """The training order of one run, a new permutation for each epoch.

    Arms of one seed have the same permutations, so that they differ in how the order
    is cut into batches and in nothing else. The present epoch's permutation is kept;
    any other is made anew from its name.
    """

    def __init__(self, spec: RunSpec, *, num_examples: int, device: str) -> None:
        self._seed = spec.seed
        self._num_examples = num_examples
        self._batch_size = spec.training.batch_size
        self._per_epoch = spec.updates_per_epoch
        self._device = device
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def indices(self, update: int) -> Tensor:
        """Return the examples of the update after ``update`` earlier ones."""
        epoch, place = divmod(update, self._per_epoch)
        if epoch != self._epoch:
            generator = stream(self._seed, "order", epoch)
            order = torch.randperm(self._num_examples, generator=generator)
            self._epoch, self._permutation = epoch, order.to(self._device)
        begin = place * self._batch_size
        return self._permutation[begin : begin + self._batch_size]
