"""Norms of sums of outer products, from inner products over pairs of positions."""

import torch
from torch import Tensor

BLOCK = 32
"""Positions taken at a time: long enough for fast products, short enough to halve."""


def gram_sq_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    r"""Return :math:`|\sum_t b_t a_t^\top|^2` of every matrix in the batch.

    It is the sum of :math:`\langle a_t, a_s \rangle \langle b_t, b_s \rangle` over the
    pairs of positions. The pairs are symmetric, so that blocks below the diagonal are
    left out: with many positions that is nearly half of the arithmetic.

    Args:
        inputs: The ``a_t``, as ``(*batch, T, d_in)``.
        grads: The ``b_t``, as ``(*batch, T, d_out)``.
    """
    parts = []
    for start in range(0, inputs.shape[-2], BLOCK):
        rows = slice(start, start + BLOCK)
        products = inputs[..., rows, :] @ inputs[..., start:, :].mT
        products.mul_(grads[..., rows, :] @ grads[..., start:, :].mT)
        parts.append(products[..., : products.shape[-2]].sum((-2, -1)))
        if start + BLOCK < inputs.shape[-2]:
            above = products[..., products.shape[-2] :].sum((-2, -1))
            parts.append(above.mul_(2))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def gram_cost(positions: int, width: int) -> int:
    """Multiplications per matrix for ``d_in + d_out = width``."""
    return positions * (positions + BLOCK) // 2 * width
