"""The processes that share one computation: who they are, and sums over them.

Everything is the identity for a process on its own, so that callers need no case
for it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from noisekit.core.arguments import shown
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import unwrap_compiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RanksSource: TypeAlias = "nn.Module | ProcessGroup | None"
"""A model, whose wrapper knows its group; a group; or ``None`` for one process."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that work on one model, and this one's rank.

    Attributes:
        group: What they talk through; ``None`` for a process on its own.
        size: How many they are.
        rank: Which of them this process is, from 0.
    """

    group: "ProcessGroup | None" = None
    size: int = 1
    rank: int = 0

    @property
    def alone(self) -> bool:
        """Whether there is nobody to sum with."""
        return self.size == 1


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile`` and ``DistributedDataParallel``."""
    inner = unwrap_compiled(model)
    if isinstance(inner, DistributedDataParallel):
        inner = unwrap_compiled(inner.module)
    return inner


def ranks_of(source: RanksSource) -> Ranks:
    """Return the processes that a model or a group belongs to.

    Args:
        source: A model wrapped in ``DistributedDataParallel``, compiled or not, stands
            for its process group; any other model, like ``None``, for this process
            alone, also where a default group exists.

    Raises:
        UsageError: If this process is not in the group.
    """
    if isinstance(source, nn.Module):
        wrapped = unwrap_compiled(source)
        if not isinstance(wrapped, DistributedDataParallel):
            return Ranks()
        source = wrapped.process_group
    if source is None:
        return Ranks()
    if not dist.is_initialized() or not _is_group(source):
        started = "" if dist.is_initialized() else " in a process without any"
        raise UsageError(
            "process_group needs to be a torch.distributed.ProcessGroup, got "
            f"{shown(source)}{started}; leave it out for a process on its own, or call "
            "torch.distributed.init_process_group() first."
        )
    rank = dist.get_rank(source)
    if rank < 0:
        raise UsageError(
            "process_group needs a group that this process belongs to, got one that "
            f"rank {dist.get_rank()} is not in; call this on the group's ranks only."
        )
    return Ranks(source, dist.get_world_size(source), rank)


def _is_group(source: object) -> bool:
    """Whether this is a process group, or what stands for it outside of it."""
    outside = source is dist.GroupMember.NON_GROUP_MEMBER
    return outside or isinstance(source, dist.ProcessGroup)


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of every rank's ``tensor``; ``tensor`` itself stays as it is.

    One all-reduce, which every rank has to take part in. The sum has the same bits on
    all of them.
    """
    if ranks.alone:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=ranks.group)
    return total


def gather_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return every rank's ``tensor``, stacked in the order of the ranks.

    One all-gather of tensors of one shape, which every rank has to take part in.
    """
    if ranks.alone:
        return tensor.unsqueeze(0)
    own = tensor.detach().contiguous()
    rows = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(rows, own, group=ranks.group)
    return torch.stack(rows)


def concatenate_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return every rank's rows, one after the other in the order of the ranks.

    The ranks may have different numbers of rows, none included, of one shape each;
    every rank has to take part.
    """
    if ranks.alone:
        return tensor
    counts = gather_over_ranks(
        torch.tensor(len(tensor), device=tensor.device), ranks
    ).tolist()
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    everything = gather_over_ranks(padded, ranks)
    pairs = zip(everything, counts, strict=True)
    return torch.cat([rows[:count] for rows, count in pairs])


def counts_over_ranks(
    own: tuple[float, int], ranks: Ranks, device: torch.device
) -> tuple[float, int]:
    """Return what losses divide by and the number of examples, over all processes."""
    if ranks.alone:
        return own
    dtype = torch.float32 if device.type == "mps" else torch.float64
    counts = torch.tensor(own, dtype=dtype, device=device)
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
