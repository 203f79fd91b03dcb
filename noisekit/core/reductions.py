"""Squared norms and inner products to the precision of their dtype at any size.

On a CPU PyTorch's norm kernels and BLAS's dot product add up float32 values one after
another in a few lanes: ``torch._foreach_norm`` is 2e-5 low at 1 M elements and 6e-3 low
at 40 M. ``Tensor.sum`` cascades, but a tensor of squares costs a second copy. Sums over
pieces that fit into the cache are as fast, and cascading those keeps seven digits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 2**17
"""Elements up to which one kernel call does: relative error a few 1e-6."""
_PIECE = 2**16
"""Elements of a larger tensor that one kernel call adds up: 256 KB, below 1e-6."""
_BLOCK = 2**12
"""The same where the pieces are views of one matrix, so that more cost nothing."""


def sq_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``|t|²`` of every tensor, stacked ``(K,)``, in their dtype.

    Half-precision tensors have to be widened before: their squares overflow.
    """
    if not any(_adds_naively(tensor) for tensor in tensors):
        return torch.stack(torch._foreach_norm(list(tensors))).square_()
    pieces = [_pieces(tensor) for tensor in tensors]
    norms = torch._foreach_norm([piece for parts in pieces for piece in parts])
    squares = torch.stack(norms).square_()
    sums, start = [], 0
    for parts in pieces:
        sums.append(squares[start : start + len(parts)].sum())
        start += len(parts)
    return torch.stack(sums)


def row_sq_norms(rows: Tensor) -> Tensor:
    """Return ``|r|²`` of every row of a matrix ``(n, m)``, ``(n,)``."""
    m = rows.shape[1]
    if rows.device.type != "cpu" or m <= _LARGE:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms.square_()
    whole = m // _BLOCK * _BLOCK
    blocks = rows[:, :whole].reshape(len(rows), -1, _BLOCK)  # (n, m // B, B)
    parts: Tensor = torch.linalg.vector_norm(blocks, dim=2)
    rest: Tensor = torch.linalg.vector_norm(rows[:, whole:], dim=1)
    return parts.square_().sum(1) + rest.square_()


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``<a, b>`` of two tensors with as many elements."""
    pairs = zip(_pieces(a.reshape(-1)), _pieces(b.reshape(-1)), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pairs]).sum()


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views of a flat large tensor; a small one as it is."""
    if not _adds_naively(tensor):
        return (tensor,)
    pieces: Sequence[Tensor] = tensor.reshape(-1).split(_PIECE)  # type: ignore[no-untyped-call]
    return pieces


def _adds_naively(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() > _LARGE
