"""A few examples that cover all classes, to check what a loss divides by."""

from collections.abc import Iterator

import torch
from torch import Tensor

from noisekit.core.batches import (
    Batch,
    count_examples,
    join_examples,
    take_examples,
    tensors_in,
)

_MAX_EXAMPLES = 48
_MIN_EXAMPLES = 4


class CoveringExamples:
    """Examples that together cover every class, collected over the batches.

    A wrong divisor of a loss that ignores or weights targets has an effect only where
    batches differ in them: a rare label may be in a single batch, and batches of one
    example, or of one class, do not differ within themselves.
    """

    def __init__(self) -> None:
        self._examples: list[tuple[float, Batch]] = []
        self._classes: set[int] = set()

    def add(self, batch: Batch) -> None:
        """Add the examples of ``batch`` with a class that none has so far."""
        count = count_examples(batch)
        if count == 0 or len(self._examples) >= _MAX_EXAMPLES:
            return
        for index, key in self._chosen(batch, count):
            example = take_examples(batch, torch.tensor([index]))
            self._examples.append((key, example))

    def joined(self) -> Iterator[tuple[Batch, list[int]]]:
        """Yield batches of them, each with where to cut it: between the classes.

        One batch for each shape of the examples; none where they cannot be joined.
        """
        by_shape: dict[tuple[torch.Size, ...], list[tuple[float, Batch]]] = {}
        for key, example in self._examples:
            shapes = tuple(t.shape for t in tensors_in(example))
            by_shape.setdefault(shapes, []).append((key, example))
        for group in by_shape.values():
            group.sort(key=lambda pair: pair[0])
            batch = join_examples([example for _, example in group])
            if batch is not None and len(group) > 1:
                keys = [key for key, _ in group]
                cuts = [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]]
                yield batch, cuts[:4] + cuts[4:][-4:]

    def _chosen(self, batch: Batch, count: int) -> list[tuple[int, float]]:
        """Positions of examples to take, each with its mean class."""
        rows = _class_rows(batch, count)
        if rows is None:
            return [(0, 0.0)] if len(self._examples) < _MIN_EXAMPLES else []
        lowest, highest = rows.amin(1), rows.amax(1)
        chosen: dict[int, None] = {}
        for ends in (lowest, highest):
            for value in torch.unique(ends).tolist():
                if value not in self._classes and len(chosen) < _MAX_EXAMPLES:
                    self._classes.add(value)
                    # The example that has most of it differs most from the others.
                    having = (rows == value).sum(1) * (ends == value)
                    chosen[int(having.argmax())] = None
        if len(self._examples) + len(chosen) < _MIN_EXAMPLES:
            chosen[0] = None
        means = rows.double().mean(1)
        return [(index, float(means[index])) for index in chosen]


def _class_rows(batch: Batch, count: int) -> Tensor | None:
    """The classes of each example ``(n, T)``: integer targets, or else inputs."""
    for part in (batch[1], batch[0]):
        for tensor in tensors_in(part):
            whole = not tensor.is_floating_point() and not tensor.is_complex()
            if whole and tensor.ndim and tensor.shape[0] == count and tensor.numel():
                return tensor.detach().reshape(count, -1).cpu().long()
    return None
