"""Validation of an eigenvalue solver's arguments."""

import torch
from torch import Tensor

from noisekit.core.arguments import shown
from noisekit.core.errors import UsageError


def check_arguments(size: int, k: int, which: str, *, tol: float, budget: int) -> None:
    """Refuse what asks for nothing, or for more than there is.

    Raises:
        UsageError: If it is.
    """
    if not 1 <= k <= size:
        raise UsageError(f"k needs to be between 1 and the size {size}, got {k}.")
    if which == "BE" and k < 2:
        raise UsageError(
            f"which='BE' needs k of at least 2, one for each end, got {k}; use 'LA' "
            "for the largest alone."
        )
    if budget < k:
        raise UsageError(
            f"max_matvecs needs to be at least k={k}, got {budget}; a first value "
            "takes about 8 products, each further one about 2."
        )


def check_block(block_size: int, k: int, budget: int) -> None:
    """Refuse blocks that the budget has no room for.

    Raises:
        UsageError: If it is.
    """
    whole_blocks = -(-k // block_size) * block_size
    if budget < whole_blocks:
        raise UsageError(
            f"max_matvecs needs room for {whole_blocks} products, whole blocks of "
            f"block_size={block_size} for k={k}, got {budget}; raise it."
        )


def check_start(start: Tensor | str | None, size: int, budget: int) -> None:
    """Refuse a start that is no direction.

    Raises:
        UsageError: If it is.
    """
    if start is None or (isinstance(start, str) and start == "random"):
        return
    if not isinstance(start, Tensor):
        raise UsageError(f"start needs to be vectors, 'random' or None, got {start!r}.")
    if start.ndim not in {1, 2} or start.shape[0] != size:
        raise UsageError(
            f"start needs shape ({size},) or ({size}, j), got {tuple(start.shape)}."
        )
    if start.reshape(size, -1).shape[1] >= budget:
        raise UsageError(
            f"start needs fewer vectors than max_matvecs={budget}, got "
            f"{start.shape[1:].numel()}: each costs a product."
        )
    if not start.is_floating_point() or start.device.type == "meta":
        raise UsageError(
            f"start needs floating-point numbers, got {shown(start)} on {start.device}."
        )
    norms = start.norm(dim=0)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise UsageError("start needs finite vectors that are not zero, got others.")
