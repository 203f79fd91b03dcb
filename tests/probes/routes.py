"""Batches, and the ways in which layers are called on them."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests.probes.networks import N, T

Inputs = tuple[Tensor, ...]


def flat() -> Inputs:
    return (torch.randn(N, 6),)


def sequences() -> Inputs:
    return (torch.randn(N, T, 6),)


def square_sequences() -> Inputs:
    """As many positions as examples."""
    return (torch.randn(N, N, 6),)


def images() -> Inputs:
    return (torch.randn(N, 2, 8, 8),)


def tokens() -> Inputs:
    return (torch.randint(7, (N, T)),)


def square_tokens() -> Inputs:
    return (torch.randint(7, (N, N)),)


def ragged() -> Inputs:
    return torch.randn(N, T, 6), torch.tensor([3, 5, 1, 4])


def steps(core: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = core(x)[0]
    return found


def time_first(core: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = core(x.transpose(0, 1))[0]
    return found.transpose(0, 1)


def packed(core: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    together = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    last: Tensor = core(together)[1][-1]
    return last


def with_state(core: nn.Module, x: Tensor) -> Tensor:
    start = x[None, :, 0, :4].contiguous()
    found: Tensor = core(x, (start, start.cos()))[0]
    return found


def attention(core: nn.Module, x: Tensor) -> Tensor:
    mixed: Tensor = core(x, x, x)[0]
    return mixed


def attention_time_first(core: nn.Module, x: Tensor) -> Tensor:
    by_time = x.transpose(0, 1)
    mixed: Tensor = core(by_time, by_time, by_time)[0]
    return mixed.transpose(0, 1)


def _later(x: Tensor) -> Tensor:
    """Which positions each position must not see."""
    ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    return ones.triu(1)


def attention_masked(core: nn.Module, x: Tensor) -> Tensor:
    later = _later(x)
    padded = torch.arange(x.shape[1], device=x.device) >= 4
    mixed: Tensor = core(
        x, x, x, key_padding_mask=padded.expand(len(x), -1), attn_mask=later
    )[0]
    return mixed


def attention_masked_each(core: nn.Module, x: Tensor) -> Tensor:
    later = _later(x)
    mixed: Tensor = core(x, x, x, attn_mask=later.expand(2 * len(x), -1, -1))[0]
    return mixed


def halves(core: nn.Module, x: Tensor) -> Tensor:
    products: Tensor = core(x[..., :2], x[..., 2:])
    return products


def by_offsets(core: nn.Module, x: Tensor) -> Tensor:
    starts = torch.arange(0, x.numel(), x.shape[1], device=x.device)
    bags: Tensor = core(x.flatten(), starts)
    return bags


def pool(core: nn.Module, x: Tensor) -> Tensor:
    pooled: Tensor = core(x).flatten(2).mean(2)
    return pooled


def pool_squares(core: nn.Module, x: Tensor) -> Tensor:
    pooled: Tensor = core(x).flatten(2).square().mean(2)
    return pooled
