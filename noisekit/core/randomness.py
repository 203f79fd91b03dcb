"""Named random streams: the same name and seed give the same numbers, always."""

import hashlib

import torch


def stream_seed(seed: int, *names: str | int) -> int:
    """Return the 63-bit seed of the stream called ``names`` under ``seed``.

    Streams are independent of each other and of the order in which they are made,
    so that adding a measurement never changes the numbers of another.
    """
    text = "/".join([str(seed), *map(str, names)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(
    seed: int, *names: str | int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator for the stream called ``names`` under ``seed``."""
    return torch.Generator(device).manual_seed(stream_seed(seed, *names))
