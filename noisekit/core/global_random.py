"""The global random state, kept as it was around what may draw from it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def global_random_state_kept() -> Iterator[None]:
    """Give back the state of Python, NumPy, PyTorch and CUDA on exit, bit for bit."""
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
