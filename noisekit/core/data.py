"""The data of a measurement: held in memory once, or read again and compared."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import torch
from torch import nn

from noisekit.core.arguments import checked
from noisekit.core.batches import (
    Batch,
    ModelBatches,
    as_batch,
    count_examples,
    map_tensors,
    take_examples,
    tensors_in,
)
from noisekit.core.errors import (
    BatchSizeError,
    DataChangedError,
    DeviceMismatchError,
    EmptyDataError,
    UsageError,
)
from noisekit.core.evaluation_mode import BatchNormPolicy, batch_norms
from noisekit.core.model_state import ModelState
from noisekit.core.randomness import preserve_rng_state
from noisekit.core.restorable import GENERATORS
from noisekit.core.settings import Count, PositiveInt

MEMORY_BUDGET = 2**30
_MASK = 2**128 - 1


class HeldBatches(Sequence[Batch]):
    """Batches held in memory: the same data, in the same order, on each pass.

    Attributes:
        num_examples: Examples over all batches.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = tuple(batches)
        self.num_examples = sum(count_examples(batch) for batch in self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> "HeldBatches": ...
    def __getitem__(self, index: int | slice) -> "Batch | HeldBatches":
        """Return one batch, or some of them, frozen too."""
        if isinstance(index, slice):
            return HeldBatches(self._batches[index])
        return self._batches[index]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def data_hash(self) -> str:
        """Return a hash of the examples; order and batching do not change it."""
        total = sum(_digest(batch, ordered=False) for batch in self._batches)
        return f"{total & _MASK:032x}"


class StreamedBatches:
    """Batches too large for memory: read again on each pass, and compared.

    A loader that only shuffles is accepted, since neither the loss nor its
    derivatives depend on the order, unless ``ordered``.
    """

    def __init__(self, loader: Iterable[Batch], *, ordered: bool = False) -> None:
        self._loader = loader
        self._ordered = ordered
        self._digest: int | None = None
        self.num_examples = 0
        self.num_batches = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield every batch; on all passes but the first, compare with the first.

        Raises:
            DataChangedError: After the last batch, if the data differ.
        """
        total = num_examples = num_batches = 0
        with preserve_loader_rng_state(self._loader):
            for item in self._loader:
                batch = as_batch(item)
                if count_examples(batch) == 0:
                    continue
                digest = _digest(batch, ordered=self._ordered)
                total = total * 31 + digest if self._ordered else total + digest
                num_examples += count_examples(batch)
                num_batches += 1
                yield batch
        total &= _MASK
        if self._digest is None:
            self._digest = total
            self.num_examples, self.num_batches = num_examples, num_batches
        elif total != self._digest:
            raise DataChangedError(
                f"needs the same data on each pass, got {num_examples} examples that "
                f"differ from the {self.num_examples} of the first pass; switch off "
                "augmentation and shuffling with drop_last, or hold the data in "
                "memory with nk.freeze(loader, num_examples=...) or a larger "
                "memory_budget=."
            )

    def keep_order(self) -> None:
        """Compare the order of the batches too from now on, since it matters."""
        if not self._ordered:
            self._ordered, self._digest = True, None

    def data_hash(self) -> str:
        """Return the hash of the examples, reading them unless that was done."""
        if self._digest is None:
            for _ in self:
                pass
        return f"{self._digest:032x}"


@checked
def freeze(
    loader: Iterable[Batch],
    *,
    num_examples: PositiveInt | None = None,
    memory_budget: Count = MEMORY_BUDGET,
) -> HeldBatches:
    """Return the batches of one pass over ``loader``, held in memory.

    The loader's generators and the global RNG state are restored, so that the
    training that uses the same loader is not changed.

    Args:
        loader: Anything that yields ``(inputs, targets)``.
        num_examples: How many to take from the start; all by default.
        memory_budget: Most memory to use [bytes].

    Raises:
        UsageError: If ``num_examples`` is not positive or not there, or the data
            exceed the budget.
        EmptyDataError: If the loader yields nothing.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(10, 2), torch.zeros(10))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
        >>> batches = nk.freeze(loader, num_examples=6)
        >>> [len(inputs) for inputs, _ in batches]
        [4, 2]
    """
    batches, complete = read_batches(
        loader, num_examples=num_examples, memory_budget=memory_budget
    )
    if not complete:
        raise UsageError(
            f"freeze needs data within memory_budget={memory_budget} bytes, got more "
            f"after {batches.num_examples} examples; raise the budget or take fewer "
            "with num_examples=."
        )
    if num_examples is not None and batches.num_examples < num_examples:
        raise UsageError(
            f"freeze needs {num_examples} examples, got a loader of "
            f"{batches.num_examples}; ask for at most that many."
        )
    return batches


def read_batches(
    loader: Iterable[Batch], *, num_examples: int | None = None, memory_budget: int
) -> tuple[HeldBatches, bool]:
    """Return what fits of one pass, and whether that was all that was asked for.

    Raises:
        EmptyDataError: If the loader yields no example.
    """
    if isinstance(loader, HeldBatches) and num_examples is None:
        return loader, True
    # A loader may fill the same tensors again for each batch; a list cannot.
    copy = not isinstance(loader, Sequence)
    taken: list[Batch] = []
    missing = float("inf") if num_examples is None else num_examples
    used, complete = 0, True
    with preserve_loader_rng_state(loader):
        for item in loader:
            batch = as_batch(item)
            count = count_examples(batch)
            if count == 0:
                continue  # as the last batch of a filtered data set may be
            if count > missing:
                batch = take_examples(batch, torch.arange(int(missing)))
            used += _bytes_of(batch)
            if copy and used > memory_budget:
                complete = False
                break
            taken.append(map_tensors(torch.clone, batch) if copy else batch)
            missing -= count
            if missing <= 0:
                break
    frozen = HeldBatches(taken)
    if complete and frozen.num_examples == 0:
        raise EmptyDataError(
            "needs at least one batch with an example, got none from "
            f"{type(loader).__name__}; a used-up iterator gives none: pass a list or "
            "a DataLoader."
        )
    return frozen, complete


@dataclass(frozen=True, slots=True)
class DataRules:
    """What batches have to be like for a model.

    Attributes:
        bn: The BatchNorm policy.
        coupled: Whether the examples of a batch act on each other under it.
        device: Where the parameters are.
    """

    bn: BatchNormPolicy
    coupled: bool
    device: torch.device

    @classmethod
    def of(
        cls, model: nn.Module, bn: BatchNormPolicy, device: torch.device
    ) -> "DataRules":
        """Return the rules for a model under a BatchNorm policy."""
        return cls(bn, bn != "running" and bool(batch_norms(model)), device)

    def check(self, batch: Batch) -> None:
        """Refuse a batch that the model cannot be measured on.

        Raises:
            BatchSizeError: If it has one example, which has no batch statistics.
            DeviceMismatchError: If it is on another device.
        """
        if self.coupled and count_examples(batch) == 1:
            raise BatchSizeError(
                f"bn={self.bn!r} needs at least 2 examples in each batch, got a batch "
                "of 1, which has no variance; use another batch size, drop_last=True "
                "or bn='running'."
            )
        for tensor in tensors_in(batch):
            if tensor.ndim and tensor.device != self.device:
                raise DeviceMismatchError(
                    f"model and data need one device, got parameters on "
                    f"{self.device} and a batch on {tensor.device}; move the "
                    "model with .to(), or wrap the loader: [(x.to(device), "
                    "y.to(device)) for x, y in loader]."
                )

    def read(
        self, batches: Iterable[Batch], memory_budget: int
    ) -> HeldBatches | StreamedBatches:
        """Return the data: in memory where they fit, else to be read on each pass.

        Raises:
            DataChangedError: If they do not fit and can be read only once.
        """
        frozen, complete = read_batches(batches, memory_budget=memory_budget)
        for batch in frozen:
            self.check(batch)
        if complete:
            return frozen
        if isinstance(batches, Iterator):
            raise DataChangedError(
                "data beyond the memory budget need to be read more than once, got an "
                f"iterator ({type(batches).__name__}), which can be read once; pass "
                "the DataLoader itself, or a larger memory_budget=."
            )
        return StreamedBatches(batches, ordered=self.bn == "batch")


@contextmanager
def preserve_loader_rng_state(loader: object) -> Iterator[None]:
    """Restore the global random state and the loader's generators on exit."""
    state = ModelState(*_generators_of(loader))
    with preserve_rng_state():
        try:
            yield
        finally:
            state.restore()


def _generators_of(loader: object) -> list[object]:
    """Random generators of a DataLoader, of its samplers and of its data set."""
    if isinstance(loader, ModelBatches):
        loader = loader.loader
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(loader, "dataset", None),
    )
    attributes = [vars(h) for h in holders if hasattr(h, "__dict__")]
    return [
        value
        for held in attributes
        for value in held.values()
        if isinstance(value, GENERATORS)
    ]


def _bytes_of(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_in(batch))


def _digest(batch: Batch, *, ordered: bool) -> int:
    """Sum of the hashes of the examples, so that their order does not matter."""
    count = count_examples(batch)
    tensors = [t.detach().cpu().contiguous() for t in tensors_in(batch)]
    tensors = [t.to_dense() if t.layout is not torch.strided else t for t in tensors]
    rows = [t for t in tensors if t.ndim and t.shape[0] == count]
    if ordered or len(rows) < len(tensors):
        return _hash([_raw(t) for t in tensors])
    raw = [memoryview(_raw(t)) for t in rows]
    widths = [len(r) // max(count, 1) for r in raw]
    total = 0
    for i in range(count):
        parts = zip(raw, widths, strict=True)
        total += _hash([r[i * w : (i + 1) * w] for r, w in parts])
    return total


def _raw(tensor: torch.Tensor) -> bytes:
    """Bytes of ``tensor``, also of types that NumPy does not know."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _hash(parts: Iterable[bytes | memoryview]) -> int:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return int.from_bytes(state.digest(), "big")
