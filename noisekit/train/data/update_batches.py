"""The examples of each update: drawn in order, augmented, cut into micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.batch_order import BatchOrder
from noisekit.train.data.augment import UNCHANGED, Augmentation, AugmentSpec
from noisekit.train.data.section import TensorPair


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Examples of one forward pass.

    Attributes:
        inputs: Their inputs.
        targets: Their classes.
        share: Their share of the update's examples.
        number: Place among the update's micro-batches, from 0.
    """

    inputs: Tensor
    targets: Tensor
    share: float
    number: int


class UpdateBatch:
    """The micro-batches of one update, made anew whenever they are gone through."""

    def __init__(
        self,
        train: TensorPair,
        augmentation: Augmentation | None,
        examples: Tensor,
        *,
        begin: int,
        microbatch: int,
    ) -> None:
        self._train = train
        self._augmentation = augmentation
        self._begin = begin
        self._examples = examples
        self._parts = (
            (examples,)
            if microbatch >= len(examples)
            else torch.split(examples, microbatch)
        )

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return len(self._parts)

    def __iter__(self) -> Iterator[Microbatch]:
        """Yield the micro-batches in order."""
        begin = self._begin
        for number, part in enumerate(self._parts):
            inputs = self._train.inputs.index_select(0, part)
            if self._augmentation is not None:
                inputs = self._augmentation(inputs, part, begin)
            targets = self._train.targets.index_select(0, part)
            yield Microbatch(inputs, targets, len(part) / len(self._examples), number)
            begin += len(part)


class UpdateBatches:
    """Makes the batch of any update from its place in the stream of permutations.

    Args:
        train: The training examples, on the device.
        seed: Seed of the run.
        device: Where the examples are.
        order: Number of another stream of permutations of the same seed.
    """

    def __init__(
        self, train: TensorPair, *, seed: int, device: str, order: int = 0
    ) -> None:
        self._train = train
        self._seed = seed
        self._order = BatchOrder(
            seed, num_examples=len(train), device=device, order=order
        )
        self._augmentation: Augmentation | None = None
        self._inactive: AugmentSpec | None = None

    def batch(
        self,
        begin: int,
        count: int,
        *,
        microbatch: int | None = None,
        augment: AugmentSpec = UNCHANGED,
    ) -> UpdateBatch:
        """Return ``count`` examples of the stream from ``begin`` on.

        Args:
            begin: Place of the first in the stream.
            count: Number of examples.
            microbatch: Examples of one forward pass; all of them if left out.
            augment: How images are changed.
        """
        return UpdateBatch(
            self._train,
            self._augmentation_by(augment),
            self._order.indices(begin, count),
            begin=begin,
            microbatch=microbatch or count,
        )

    def _augmentation_by(self, augment: AugmentSpec) -> Augmentation | None:
        """Return what changes the images, made anew where a phase asks for another."""
        if augment is self._inactive:
            return None
        if not augment.active:
            self._inactive = augment  # to compare settings takes longer than to draw
            return None
        if self._augmentation is None or self._augmentation.spec != augment:
            self._augmentation = Augmentation(augment, self._train.inputs, self._seed)
        return self._augmentation
