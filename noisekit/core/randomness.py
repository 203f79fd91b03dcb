"""Random number generators: named streams, and the preserved state of global RNGs."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
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


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the RNG states of Python, NumPy, PyTorch and CUDA on exit, exactly."""
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002  what users' data sets draw from
    cpu = torch.get_rng_state()
    # Asking a CUDA that was never used would start it, and start it slowly.
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
