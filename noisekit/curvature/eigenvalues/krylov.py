"""An orthonormal Krylov basis of bounded size, and the matrix projected on it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from noisekit.curvature.operators.operator import SymmetricOperator
from noisekit.curvature.random_vectors import probe_block

Which = Literal["LA", "SA", "BE"]

# Columns of the basis rotated at a time in a restart: (m, 4096) float32 of m = 40 is
# 0.6 MB, which stays in the cache.
_RESTART_COLUMNS = 4096


@dataclass(frozen=True, slots=True)
class RitzPairs:
    """Eigenpairs of the projected matrix, best first.

    Attributes:
        values: Ritz values.
        coefficients: ``(m, m)``, the pairs' vectors in terms of the basis.
        residuals: ``|H v - value v|`` of each pair, rounding included.
        norm: Largest magnitude of any Ritz value so far, about the norm of ``H``.
        num_steps: Block products so far.
        invariant: Whether ``H`` maps the basis into itself, up to rounding.
        exhausted: Whether the basis spans everything.
    """

    values: np.ndarray
    coefficients: np.ndarray
    residuals: np.ndarray
    norm: float
    num_steps: int
    invariant: bool
    exhausted: bool

    @property
    def finite(self) -> bool:
        """Whether all products so far were finite."""
        return bool(np.isfinite(self.norm))

    @property
    def gap(self) -> float:
        """Distance of the best Ritz value from the next."""
        return float(abs(self.values[0] - self.values[1]))


class KrylovBasis:
    """Lanczos vectors, fully reorthogonalized, with thick restarts.

    A step multiplies the newest block of vectors; the part of the products that is
    orthogonal to the basis is the next block. The projected matrix holds the inner
    products with the whole basis, not only with the last two blocks, so that restarts
    and new random directions need no separate formulas.

    With ``Q`` the basis, ``T`` the projected matrix and ``N`` the orthonormal next
    block, ``H Q = Q T + N F E``: ``F`` is small and triangular, and ``E`` picks the
    newest block, since the basis by now contains the rest of all older products.

    Source:
        Wu and Simon 2000, "Thick-restart Lanczos method for large symmetric
        eigenvalue problems", SIAM J. Matrix Anal. Appl. 22; Golub and Underwood 1977,
        "The block Lanczos method for computing eigenvalues".

    Attributes:
        block_size: Most vectors multiplied at a time.
        num_matvecs: Products spent, one per vector of a block.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        *,
        which: Which,
        capacity: int,
        num_kept: int,
        block_size: int,
        generator: torch.Generator,
    ) -> None:
        size = operator.shape[0]
        self._operator = operator
        self._which = which
        self._capacity = min(capacity, size)
        self._num_kept = num_kept
        self.block_size = min(block_size, size)
        self._generator = generator
        self._dtype = torch.promote_types(operator.dtype, torch.float32)
        self._device = operator.device
        # Not zeroed: pages that no vector has come to take no memory.
        self._vectors = torch.empty(
            (self._capacity, size), dtype=self._dtype, device=self._device
        )
        self._projected = np.zeros((self._capacity, self._capacity))
        self._count = 0
        self._newest = slice(0, 0)
        self._neighbours = 0
        self._restarted = False
        self._norm = 0.0
        self._next = self._vectors.new_empty((0, size))
        self._factor = np.zeros((0, 0))
        self._num_steps = 0
        self.num_matvecs = 0

    def begin(self, start: Tensor) -> None:
        """Start from random directions, with the start vectors added to them.

        The random part is as long as a start vector. It contains every eigenvector,
        and stays visible when a start is one exactly: the first step then splits the
        two, and the steps after it belong to the random part. A weaker one would have
        to outgrow what a start has wrong before anything new showed.
        """
        block = self._random_block(self.block_size)  # (b, P)
        for i, vector in enumerate(start.to(block).T):
            block[i % len(block)] += vector / vector.norm()
        self._append(_orthonormal(block)[0])

    def step(self) -> None:
        """Multiply the newest block and orthogonalize the product."""
        basis = self._vectors[: self._count]  # (m, P), Q'
        product = self._multiplied(basis[self._newest])  # (b, P), the newest of H Q
        # H q = Q (Q' H q) + N F: inside the basis, and the next block N outside of it.
        rest, coefficients = _orthogonalized(product, basis, self._neighbours)
        self._next, factor = _orthonormal(rest)  # (b, P) and (b, b)
        # One transfer per step; the device works ahead for all the rest.
        numbers = torch.cat([coefficients, factor.to(coefficients)]).cpu().numpy()
        inner, self._factor = numbers[: self._count], numbers[self._count :]
        self._projected[: self._count, self._newest] = inner
        self._projected[self._newest, : self._count] = inner.T
        # T is symmetric in exact arithmetic, so a column is its row as well; only the
        # diagonal block comes out of rounding slightly unsymmetric.
        square = inner[self._newest]
        self._projected[self._newest, self._newest] = (square + square.T) / 2
        # |Q' H q| <= |H| for any unit q: a lower bound of the norm from the first step.
        self._norm = max(self._norm, float(np.linalg.norm(inner[:, -1])))
        self._num_steps += 1
        self.num_matvecs += len(product)

    @property
    def ended(self) -> bool:
        """Whether there is no next block: nothing is left, or it is not finite."""
        if not np.isfinite(self._factor).all():
            return True
        return not self._alive()[1].any()

    def ritz(self) -> RitzPairs:
        """Return the eigenpairs of the projected matrix."""
        matrix = self._projected[: self._count, : self._count]
        if not (np.isfinite(matrix).all() and np.isfinite(self._factor).all()):
            values = np.full(self._count, np.nan)
            return RitzPairs(values, matrix, values, np.nan, 0, False, False)
        values, coefficients = np.linalg.eigh(matrix)
        order = _best_first(len(values), self._which)
        values, coefficients = values[order], coefficients[:, order]
        self._norm = max(self._norm, float(np.abs(values).max()))
        # For x = Q y with T y = theta y: H x - theta x = N F E y, so that its norm is
        # |F (newest rows of y)| (Parlett 1998, "The symmetric eigenvalue problem",
        # section 13.2). Rounding of the products themselves is added, which no
        # projection can show.
        rounding = torch.finfo(self._operator.dtype).eps * self._norm
        outside = self._factor @ coefficients[self._newest]
        return RitzPairs(
            values=values,
            coefficients=coefficients,
            residuals=np.linalg.norm(outside, axis=0) + rounding,
            norm=self._norm,
            num_steps=self._num_steps,
            invariant=not self._alive()[1].any(),
            exhausted=self._count == self._operator.shape[0],
        )

    def advance(self, ritz: RitzPairs) -> None:
        """Append the next block, after a restart where there is no room for it."""
        if self._count + self._next_width() > self._capacity:
            self._restart(ritz)
        self.extend()

    def extend(self) -> None:
        """Append the next block; a random one if the basis spans an invariant space."""
        rotation, alive = self._alive()
        width = self._next_width()
        # F = U S V', so that N U are the directions of the next block, strongest first:
        # those at rounding level carry no information and are dropped.
        if not alive.any():
            block = self._random_block(width)
            block = _orthogonalized(block, self._vectors[: self._count], 0)[0]
            self._append(_orthonormal(block)[0])
        elif len(alive) == width:
            self._append(self._next)
        else:
            directions = torch.from_numpy(rotation[:, :width].T.copy())
            self._append(directions.to(self._next) @ self._next)

    def _next_width(self) -> int:
        strong = int(self._alive()[1].sum())
        return min(strong or self.block_size, self._operator.shape[0] - self._count)

    def vectors(self, ritz: RitzPairs, count: int) -> Tensor:
        """Return the first ``count`` Ritz vectors, ``(P, count)``."""
        weights = self._weights(ritz.coefficients[:, :count])
        rows = weights @ self._vectors[: self._count]  # (count, P)
        return rows.div_(rows.norm(dim=1, keepdim=True)).T

    def _multiplied(self, block: Tensor) -> Tensor:
        """Products with the rows of ``block``, as rows."""
        rows = block.to(self._operator.dtype)
        if len(rows) == 1:
            return (self._operator @ rows[0]).to(self._dtype)[None]
        return (self._operator @ rows.T).T.to(self._dtype)

    def _append(self, block: Tensor) -> None:
        # Three-term recurrence: H q lies in the span of its own block, the one before
        # and the next. Directly after a restart the one before is replaced by all kept
        # Ritz vectors, since N F couples to each of them.
        self._neighbours = 0 if self._restarted else self._newest.start
        self._restarted = False
        self._newest = slice(self._count, self._count + len(block))
        self._vectors[self._newest] = block
        self._count += len(block)

    def _random_block(self, width: int) -> Tensor:
        shape = (self._vectors.shape[1], width)
        block = probe_block(
            shape, self._generator, (self._dtype, self._device), probe="normal"
        )
        return torch.nn.functional.normalize(block.T, dim=1)

    def _alive(self) -> tuple[np.ndarray, np.ndarray]:
        """Left singular vectors of ``F``, and a mask of those that exceed rounding."""
        rotation, strengths, _ = np.linalg.svd(self._factor)
        # Two passes of reorthogonalization leave a few roundings of the norm; 50 of
        # them are far below any coupling that matters.
        rounding = torch.finfo(self._operator.dtype).eps
        return rotation, np.asarray(strengths > 50 * rounding * self._norm)

    def _restart(self, ritz: RitzPairs) -> None:
        """Keep the best Ritz vectors only, written over the basis piece by piece."""
        kept = min(self._num_kept, self._capacity - self.block_size)
        weights = self._weights(ritz.coefficients[:, :kept])
        # In place, some columns at a time, so that no second basis is allocated.
        for begin in range(0, self._vectors.shape[1], _RESTART_COLUMNS):
            piece = self._vectors[:, begin : begin + _RESTART_COLUMNS]
            piece[:kept] = weights @ piece[: self._count]
        # Ritz vectors diagonalize T. Their coupling to the next block is measured by
        # the next step, which orthogonalizes against all of them.
        self._projected[:] = 0.0
        self._projected[range(kept), range(kept)] = ritz.values[:kept]
        self._count = kept
        self._restarted = True

    def _weights(self, coefficients: np.ndarray) -> Tensor:
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T))
        return weights.to(self._vectors)


def _best_first(count: int, which: Which) -> np.ndarray:
    """Indices of ascending values, the wanted end first; alternating for both."""
    if which == "SA":
        return np.arange(count)
    downwards = np.arange(count)[::-1]
    if which == "LA":
        return downwards
    alternating = np.empty(2 * count, dtype=int)
    alternating[0::2], alternating[1::2] = downwards, np.arange(count)
    return alternating[:count]


def _orthogonalized(
    block: Tensor, basis: Tensor, neighbours: int
) -> tuple[Tensor, Tensor]:
    """Component of ``block`` orthogonal to the basis, and its inner products with it.

    Full reorthogonalization by classical Gram-Schmidt in two passes: after one, the
    rounding error left grows into spurious copies of converged eigenvalues ("ghosts").
    The first pass is restricted to the vectors from ``neighbours`` on: to all others
    the block is orthogonal up to rounding, which the second pass removes.

    Source:
        Giraud et al. 2005, "Rounding error analysis of the classical Gram-Schmidt
        orthogonalization process": two passes suffice to working precision.
    """
    near = basis[neighbours:]
    first = near @ block.T  # (m, b)
    block = block - first.T @ near
    second = basis @ block.T  # (m, b)
    rest = block - second.T @ basis
    # Inner products of both passes add up to Q' H q.
    coefficients = second.double()
    coefficients[neighbours:] += first.double()
    return rest, coefficients


def _orthonormal(block: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows ``N`` and a small ``F`` with ``block.T = N.T F``."""
    if len(block) == 1:
        norm = block.norm().reshape(1, 1)
        return block / norm.clamp_min(torch.finfo(block.dtype).tiny), norm
    # Householder QR: (P, b) = (P, b) (b, b), orthonormal also where rank deficient.
    columns, factor = torch.linalg.qr(block.T)
    return columns.T.contiguous(), factor
