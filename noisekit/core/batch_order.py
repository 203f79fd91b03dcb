"""Which examples each update sees: a stretch of an endless stream of permutations."""

import torch
from torch import Tensor

from noisekit.core.randomness import stream


class BatchOrder:
    """The training order of one run: one permutation of the examples after the other.

    A function of the seed and the cursor alone. Arms of one seed have the same
    permutations, so that they differ in how the stream is cut into batches and in
    nothing else, and a resumed run needs the cursor only. The present permutation is
    kept; any other is made anew from its name.
    """

    def __init__(
        self, seed: int, *, num_examples: int, device: str, order: int = 0
    ) -> None:
        """Make the order of a run.

        Args:
            seed: Seed of the run.
            num_examples: Examples of one permutation.
            device: Where the indices are needed.
            order: Number of another stream of permutations of the same seed; 0 is the
                one that all arms have.
        """
        self._seed = seed
        self._stream: tuple[str | int, ...] = ("order",)
        if order:
            self._stream = ("another order", order)
        self._num_examples = num_examples
        self._device = device
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def indices(self, cursor: int, count: int) -> Tensor:
        """Return ``count`` examples of the stream from ``cursor`` on.

        A stretch over the end of a pass goes on with the next permutation, and may
        have an example twice.

        Args:
            cursor: Examples of the stream before the first.
            count: Number of examples.
        """
        epoch, place = divmod(cursor, self._num_examples)
        stretch = self._permutation_of(epoch)[place : place + count]
        if stretch.shape[0] == count:  # len() of a tensor takes longer
            return stretch
        parts = [stretch]
        missing = count - len(stretch)
        while missing > 0:
            epoch += 1
            parts.append(self._permutation_of(epoch)[:missing])
            missing -= len(parts[-1])
        return torch.cat(parts)

    def _permutation_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = stream(self._seed, *self._stream, epoch)
            order = torch.randperm(self._num_examples, generator=generator)
            self._epoch, self._permutation = epoch, order.to(self._device)
        return self._permutation
