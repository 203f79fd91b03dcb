"""Random vectors from an explicit generator, on any device."""

import secrets
from typing import Literal

import torch
from torch import Tensor

from noisekit.core.distributed import Ranks, gather_over_ranks

Probe = Literal["rademacher", "normal"]


def entropy_generator(generator: torch.Generator | None) -> torch.Generator:
    """Return ``generator``, or a new one of fresh entropy: never a fixed seed."""
    if generator is not None:
        return generator
    return torch.Generator().manual_seed(secrets.randbits(63))


def shared_generator(
    generator: torch.Generator | None, ranks: Ranks, device: torch.device
) -> torch.Generator:
    """Return ``generator``, or one of fresh entropy, in one state on all ranks.

    A product over several processes is one of all parts of the matrix with the same
    vector. So the state is the first rank's, whatever seeds the others were given.

    Args:
        generator: The caller's.
        ranks: The processes that the operator's data are spread over.
        device: Where they exchange tensors.
    """
    drawn = entropy_generator(generator)
    if not ranks.alone:
        states = gather_over_ranks(drawn.get_state().to(device), ranks)
        drawn.set_state(states[0].cpu())
    return drawn


def normal_vector(
    size: int, generator: torch.Generator, like: tuple[torch.dtype, torch.device]
) -> Tensor:
    """Return a standard normal vector; the numbers do not depend on the device."""
    dtype, device = like
    drawn = torch.randn(size, generator=generator, device=generator.device)
    return drawn.to(device, dtype)


def sign_vector(
    size: int, generator: torch.Generator, like: tuple[torch.dtype, torch.device]
) -> Tensor:
    """Return a vector of independent signs, each +1 or -1 (Rademacher)."""
    dtype, device = like
    bits = torch.randint(2, (size,), generator=generator, device=generator.device)
    return bits.to(device, dtype) * 2 - 1


def probe_block(
    shape: tuple[int, int],
    generator: torch.Generator,
    like: tuple[torch.dtype, torch.device],
    *,
    probe: Probe = "rademacher",
) -> Tensor:
    """Return ``(P, k)``: ``k`` independent vectors of mean 0 and covariance one.

    They are drawn one after the other, so that the numbers do not depend on how many
    are drawn at a time.
    """
    size, count = shape
    draw = sign_vector if probe == "rademacher" else normal_vector
    columns = [draw(size, generator, like) for _ in range(count)]
    return torch.stack(columns, 1)
