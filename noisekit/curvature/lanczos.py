"""The largest or smallest eigenvalues of a symmetric operator."""

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.curvature.krylov import KrylovBasis, RitzPairs, Which
from noisekit.curvature.operator import MatrixLike, SymmetricOperator, as_operator
from noisekit.curvature.random_vectors import entropy_generator

_MIN_STEPS = 4


@dataclass(frozen=True, slots=True)
class EigenPairs:
    """Eigenvalues, best first, each with a bound on how wrong it may be.

    Attributes:
        values: ``(k,)``, in double precision, on the CPU.
        vectors: ``(P, k)``, of unit norm, where the operator is.
        residuals: ``|H v - value v|``: an eigenvalue lies at most this far from the
            value. That it is the largest one is very likely, not certain.
        statuses: Per pair, whether the tolerance was met.
        num_matvecs: Products spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    statuses: tuple[Status, ...]
    num_matvecs: int

    @property
    def converged(self) -> bool:
        """Whether all pairs met the tolerance."""
        return all(status is Status.OK for status in self.statuses)

    def estimate(self, index: int = 0) -> Estimate:
        """Return one eigenvalue with its residual bound and status."""
        return Estimate(
            value=float(self.values[index]),
            bound=float(self.residuals[index]),
            error_source=ErrorSource.SOLVER,
            status=self.statuses[index],
            num_matvecs=self.num_matvecs,
        )


def top_eigenpairs(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    k: int = 1,
    *,
    which: Which = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> EigenPairs:
    """Return the ``k`` largest or smallest (algebraic) eigenpairs, by Lanczos.

    The basis is orthogonalised in full, twice, so there are no ghost copies, and is
    restarted from its best vectors at a fixed size, so memory does not grow. Of an
    eigenvalue that occurs several times all copies are found in matrices that are
    small or of low rank; else one copy is sure.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        k: How many.
        which: ``"LA"`` for the largest, ``"SA"`` for the smallest.
        tol: Wanted accuracy, relative to the estimated norm of ``H``. Of several
            pairs the residuals must be below it, and one value more than asked must
            have settled. Of one pair, whose error is about the squared residual over
            the gap to the next, that quotient must be, and the residual below ten
            times it.
        max_matvecs: Most products to spend; ``100 + 20 k`` by default.
        generator: Of the random start; fresh entropy by default.
        start: A vector ``(P,)``, or several ``(P, j)``, expected near the wanted
            ones, such as an earlier result. Random directions come in beside it.

    Returns:
        The pairs. One that stopped at ``max_matvecs`` is ``NOT_CONVERGED``; if a
        product was not finite all are ``DIVERGED`` and NaN.

    Raises:
        UsageError: If an argument is outside what it may be.
    """
    operator = as_operator(H)
    budget = 100 + 20 * k if max_matvecs is None else max_matvecs
    _check_arguments(operator.shape[0], k, which, tol, budget)
    _check_start(start, operator.shape[0], budget)
    capacity = max(40, 2 * k + 20)
    basis = KrylovBasis(
        operator,
        which=which,
        capacity=capacity,
        num_kept=k + 10,
        generator=entropy_generator(generator),
    )
    rule = _StoppingRule(k, tol, small=operator.shape[0] <= capacity)
    basis.begin(start)
    while True:
        basis.step()
        ritz = basis.ritz()
        if not ritz.finite:
            return _diverged(operator, k, basis.num_matvecs)
        if rule.satisfied(ritz) or basis.num_matvecs >= budget:
            break
        basis.advance(ritz, target=rule.target(ritz))
    return EigenPairs(
        values=torch.from_numpy(ritz.values[:k].copy()),
        vectors=basis.vectors(ritz, k).to(operator.dtype),
        residuals=torch.from_numpy(ritz.residuals[:k].copy()),
        statuses=rule.statuses(ritz),
        num_matvecs=basis.num_matvecs,
    )


class _StoppingRule:
    """Decides when the wanted Ritz values have settled."""

    def __init__(self, k: int, tol: float, *, small: bool) -> None:
        self._k = k
        self._tol = tol
        # Copies of an eigenvalue only show when the whole space is gone through.
        self._to_the_end = small and k > 1
        self._values_when_invariant: np.ndarray | None = None

    def satisfied(self, ritz: RitzPairs) -> bool:
        if ritz.exhausted:
            return True
        if ritz.invariant:
            return self._nothing_new(ritz)
        # A chain set out anew from an invariant space runs until it is invariant as
        # well: its first values say nothing about the directions to come.
        anew = self._values_when_invariant is not None
        if anew or self._to_the_end or len(ritz.values) < self._k:
            return False
        if ritz.random_steps < _MIN_STEPS:
            return False
        return all(self._met(ritz)) and self._one_more_settled(ritz)

    def target(self, ritz: RitzPairs) -> int:
        """Return the first pair that has not settled, or the next after them."""
        met = self._met(ritz) if len(ritz.values) >= self._k else [False]
        first = met.index(False) if False in met else self._k
        return min(first, len(ritz.values) - 1)

    def statuses(self, ritz: RitzPairs) -> tuple[Status, ...]:
        return tuple(Status.OK if m else Status.NOT_CONVERGED for m in self._met(ritz))

    def _met(self, ritz: RitzPairs) -> list[bool]:
        limit = self._tol * ritz.norm
        if ritz.exhausted or ritz.invariant:
            return [True] * self._k
        if self._k > 1 or len(ritz.values) < 2:
            return [bool(r <= limit) for r in ritz.residuals[: self._k]]
        residual = float(ritz.residuals[0])
        return [residual <= 10 * limit and residual**2 <= limit * ritz.gap]

    def _one_more_settled(self, ritz: RitzPairs) -> bool:
        """Whether the next value, too, is known well enough not to overtake."""
        if len(ritz.values) == self._k:
            return False
        residual = float(ritz.residuals[self._k])
        if self._k == 1:
            return residual <= 0.3 * ritz.gap
        return residual <= 10 * self._tol * ritz.norm

    def _nothing_new(self, ritz: RitzPairs) -> bool:
        """Whether the block grown from one more direction changed nothing.

        The first invariant space holds one vector of each eigenvalue only.
        """
        values = ritz.values[: self._k]
        before, self._values_when_invariant = self._values_when_invariant, values
        if self._k == 1:
            return True
        if before is None or len(before) < self._k:
            return False
        return bool(np.allclose(before, values, rtol=0.0, atol=1e-6 * ritz.norm))


def _diverged(operator: SymmetricOperator, k: int, num_matvecs: int) -> EigenPairs:
    nothing = torch.full((k,), torch.nan, dtype=torch.float64)
    vectors = torch.full((operator.shape[0], k), torch.nan)
    return EigenPairs(
        values=nothing,
        vectors=vectors.to(operator.device, operator.dtype),
        residuals=nothing.clone(),
        statuses=(Status.DIVERGED,) * k,
        num_matvecs=num_matvecs,
    )


def _check_arguments(size: int, k: int, which: str, tol: float, budget: int) -> None:
    if not 1 <= k <= size:
        raise UsageError(f"k needs to be between 1 and the size {size}, got {k}.")
    if which not in get_args(Which):
        raise UsageError(
            f"which needs to be 'LA' (largest) or 'SA' (smallest), got {which!r}; "
            "eigenvalues are ordered with their sign, not by magnitude."
        )
    if not 0.0 < tol < 1.0:
        raise UsageError(f"tol needs to be between 0 and 1, got {tol}.")
    if budget < k:
        raise UsageError(
            f"max_matvecs needs to be at least k={k}, got {budget}; a first value "
            "takes about 8 products, each further one about 2."
        )


def _check_start(start: Tensor | None, size: int, budget: int) -> None:
    if start is None:
        return
    if start.ndim not in {1, 2} or start.shape[0] != size:
        raise UsageError(
            f"start needs shape ({size},) or ({size}, j), got {tuple(start.shape)}."
        )
    if start.reshape(size, -1).shape[1] >= budget:
        raise UsageError(
            f"start needs fewer vectors than max_matvecs={budget}, got "
            f"{start.shape[1:].numel()}: each costs a product."
        )
    norms = start.norm(dim=0)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise UsageError("start needs finite vectors that are not zero, got others.")
