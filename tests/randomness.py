"""Random numbers that are the same in each run."""

import torch


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator of PyTorch with this seed."""
    return torch.Generator().manual_seed(seed)
