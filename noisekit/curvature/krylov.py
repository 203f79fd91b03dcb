"""An orthonormal Krylov basis of bounded size, and the matrix projected on it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from noisekit.curvature.operator import SymmetricOperator
from noisekit.curvature.random_vectors import normal_vector

Which = Literal["LA", "SA"]


@dataclass(frozen=True, slots=True)
class RitzPairs:
    """Eigenpairs of the projected matrix, best first.

    Attributes:
        values: Ritz values.
        coefficients: ``(m, m)``, the pairs' vectors in terms of the basis.
        residuals: ``|H v - value v|`` of each pair, rounding included.
        norm: Largest magnitude of any Ritz value so far, about the norm of ``H``.
        random_steps: Steps of the random chain.
        invariant: Whether ``H`` maps the basis into itself, up to rounding.
        exhausted: Whether the basis spans everything.
    """

    values: np.ndarray
    coefficients: np.ndarray
    residuals: np.ndarray
    norm: float
    random_steps: int
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
    """Lanczos vectors, each orthogonalised twice against all that are kept.

    One chain of products sets out from a random direction, and one from each start
    vector. What the last product of a chain has outside the basis is the chain's end,
    and becomes a basis vector when the chain goes on. The projected matrix is made of
    inner products with the whole basis, not only of the last two vectors, so that
    chains, restarts and new directions need no separate formulas.

    Source:
        Wu and Simon 2000, "Thick-restart Lanczos method for large symmetric
        eigenvalue problems", SIAM J. Matrix Anal. Appl. 22.

    Attributes:
        num_matvecs: Products spent.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        *,
        which: Which,
        capacity: int,
        num_kept: int,
        generator: torch.Generator,
    ) -> None:
        size = operator.shape[0]
        self._operator = operator
        self._sign = -1.0 if which == "LA" else 1.0
        self._capacity = min(capacity, size)
        self._num_kept = num_kept
        self._generator = generator
        self._dtype = torch.promote_types(operator.dtype, torch.float32)
        self._device = operator.device
        self._vectors = torch.zeros(
            (self._capacity, size), dtype=self._dtype, device=self._device
        )
        self._projected = np.zeros((self._capacity, self._capacity))
        self._count = 0
        self._norm = 0.0
        # Row 0 is the random chain. A share says how much of a chain's end is in the
        # product of a basis vector: all of it in that of the chain's last vector.
        self._ends = self._vectors.new_zeros((1, size))
        self._end_norms = np.zeros(1)
        self._shares = np.zeros((1, self._capacity))
        self._chain = 0
        self._random_steps = 0
        self.num_matvecs = 0

    def begin(self, start: Tensor | None) -> None:
        """Take in ``start``, then set out from a random direction.

        Only a random direction contains every eigenvector. Were it merely mixed into
        a start near one eigenvector, the others would be too faint to be seen.
        """
        if start is not None:
            self._take_in(start)
        self._set_out()

    def step(self) -> None:
        """Multiply the newest vector and orthogonalise what comes out."""
        self._count += 1
        basis = self._vectors[: self._count]
        newest = basis[-1]
        if len(self._ends) > 1:
            self._ends = self._ends - torch.outer(self._ends @ newest, newest)
        product = self._operator @ newest.to(self._operator.dtype)
        rest, coefficients = _orthogonalised(product.to(self._dtype), basis)
        self._ends[self._chain] = rest
        # One transfer per step; the device works ahead for all the rest.
        numbers = torch.cat([coefficients, self._ends.norm(dim=1)]).tolist()
        self._projected[: self._count, self._count - 1] = numbers[: self._count]
        self._projected[self._count - 1, : self._count] = numbers[: self._count]
        self._end_norms = np.array(numbers[self._count :])
        self._shares[self._chain] = 0.0
        self._shares[self._chain, self._count - 1] = 1.0
        self._random_steps += self._chain == 0
        self.num_matvecs += 1

    def ritz(self) -> RitzPairs:
        """Return the eigenpairs of the projected matrix."""
        matrix = self._projected[: self._count, : self._count]
        if not (np.isfinite(matrix).all() and np.isfinite(self._end_norms).all()):
            values = np.full(self._count, np.nan)
            return RitzPairs(values, matrix, values, np.nan, 0, False, False)
        values, coefficients = np.linalg.eigh(matrix)
        order = np.argsort(self._sign * values, kind="stable")
        values, coefficients = values[order], coefficients[:, order]
        self._norm = max(self._norm, float(np.abs(values).max()))
        rounding = torch.finfo(self._operator.dtype).eps * self._norm
        return RitzPairs(
            values=values,
            coefficients=coefficients,
            residuals=self._outside(coefficients).sum(0) + rounding,
            norm=self._norm,
            random_steps=self._random_steps,
            invariant=not self._alive().any(),
            exhausted=self._count == self._operator.shape[0],
        )

    def advance(self, ritz: RitzPairs, *, target: int) -> None:
        """Go on with the chain that is most to blame for the residual of ``target``."""
        blame = self._outside(ritz.coefficients)[:, target]
        if self._count == self._capacity:
            self._restart(ritz)
        alive = self._alive()
        if not alive.any():
            self._set_out()
            return
        self._chain = int(np.argmax(blame * alive))
        end = self._ends[self._chain]
        if len(self._ends) > 1:
            end = _orthogonalised(end, self._vectors[: self._count])[0]
        self._vectors[self._count] = end / end.norm()

    def vectors(self, ritz: RitzPairs, count: int) -> Tensor:
        """Return the first ``count`` Ritz vectors, ``(P, count)``."""
        found = self._combined(ritz.coefficients[:, :count])  # (count, P)
        return torch.nn.functional.normalize(found, dim=1).T.contiguous()

    def _take_in(self, start: Tensor) -> None:
        size = self._vectors.shape[1]
        near = start.to(self._device, self._dtype).reshape(size, -1)
        count = min(near.shape[1], self._capacity - 1)
        if count == 0:
            return
        basis = torch.linalg.qr(near[:, :count])[0].T.contiguous()
        products = self._operator @ basis.T.to(self._operator.dtype)
        products = products.T.to(self._dtype)
        projected = basis @ products.T
        self._projected[:count, :count] = projected.double().cpu().numpy()
        self._vectors[:count] = basis
        self._ends = torch.cat([self._ends, products - projected.T @ basis])
        self._shares = np.eye(count + 1, self._capacity, k=-1)
        self._count = count
        self.num_matvecs += count

    def _set_out(self) -> None:
        """Begin the random chain, anew where everything so far is invariant."""
        size = self._vectors.shape[1]
        vector = normal_vector(size, self._generator, (self._dtype, self._device))
        vector = _orthogonalised(vector, self._vectors[: self._count])[0]
        self._vectors[self._count] = vector / vector.norm()
        self._chain = 0

    def _outside(self, coefficients: np.ndarray) -> np.ndarray:
        """Norm of what each chain's end contributes to each residual."""
        shares = self._shares[:, : self._count] @ coefficients
        return np.asarray(self._end_norms[:, None] * np.abs(shares))

    def _alive(self) -> np.ndarray:
        """Which chains have an end that is more than rounding."""
        rounding = torch.finfo(self._operator.dtype).eps
        return np.asarray(self._end_norms > 50 * rounding * self._norm)

    def _restart(self, ritz: RitzPairs) -> None:
        """Keep the best Ritz vectors only."""
        kept = min(self._num_kept, self._capacity - 1)
        shares = self._shares[:, : self._count] @ ritz.coefficients[:, :kept]
        self._vectors[:kept] = self._combined(ritz.coefficients[:, :kept])
        self._projected[:] = 0.0
        self._projected[range(kept), range(kept)] = ritz.values[:kept]
        self._shares[:] = 0.0
        self._shares[:, :kept] = shares
        self._count = kept

    def _combined(self, coefficients: np.ndarray) -> Tensor:
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T))
        basis = self._vectors[: self._count]
        return torch.mm(weights.to(basis), basis)


def _orthogonalised(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Part of ``vector`` outside the basis, and its inner products with the basis.

    Two passes: after one, what rounding leaves grows into copies of eigenvalues.
    """
    first = basis @ vector
    vector = vector - basis.T @ first
    second = basis @ vector
    coefficients = first.double() + second.double()
    return vector - basis.T @ second, coefficients
