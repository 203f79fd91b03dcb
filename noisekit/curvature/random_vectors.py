"""Random vectors from an explicit generator, on whatever device is asked."""

import secrets

import torch
from torch import Tensor


def entropy_generator(generator: torch.Generator | None) -> torch.Generator:
    """Return ``generator``, or a new one of fresh entropy: never a fixed seed."""
    if generator is not None:
        return generator
    return torch.Generator().manual_seed(secrets.randbits(63))


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
