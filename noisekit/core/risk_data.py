"""The data of a risk: read, held or read again, and checked against the model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from noisekit.core.batches import Batch, count_examples, tensors_in
from noisekit.core.data import FrozenBatches, StreamedBatches, read_batches
from noisekit.core.distributed import Ranks, gather_over_ranks, sum_over_ranks
from noisekit.core.errors import (
    BatchSizeError,
    DataChangedError,
    DeviceMismatchError,
)
from noisekit.core.evaluation_mode import BatchNormPolicy, batch_norms, unwrap_compiled
from noisekit.core.normalisation import (
    Normaliser,
    check_targets_alike,
    most_telling,
)
from noisekit.core.risk_values import zero


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
    ) -> FrozenBatches | StreamedBatches:
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


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile`` and ``DistributedDataParallel``."""
    inner = unwrap_compiled(model)
    if isinstance(inner, DistributedDataParallel):
        inner = unwrap_compiled(inner.module)
    return inner


def telling_batches(
    batches: FrozenBatches | StreamedBatches, normaliser: Normaliser | None
) -> list[Batch]:
    """Return the batches on which to check what the loss divides by.

    Raises:
        NormaliserError: If targets per example differ and no normaliser counts them.
    """
    if not isinstance(batches, FrozenBatches):
        return [next(iter(batches))]
    if normaliser is None:
        check_targets_alike(batches)
    return most_telling(batches)


def counts_over_ranks(
    own: tuple[float, int], ranks: Ranks, device: torch.device
) -> tuple[float, int]:
    """Return what losses divide by and the number of examples, over all processes."""
    if ranks.alone:
        return own
    counts = torch.tensor(own, dtype=zero(device).dtype, device=device)
    total, num_examples = sum_over_ranks(counts, ranks).tolist()
    return total, round(num_examples)


def hash_over_ranks(own: str, ranks: Ranks, device: torch.device) -> str:
    """Return the hash of all processes' examples from that of this one's."""
    if ranks.alone:
        return own
    digits = torch.tensor(list(bytes.fromhex(own)), device=device)
    rows = gather_over_ranks(digits, ranks).tolist()
    total = sum(int.from_bytes(bytes(row), "big") for row in rows)
    return f"{total % 2**128:032x}"
