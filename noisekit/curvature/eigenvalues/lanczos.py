"""The largest or smallest eigenvalues of a symmetric operator."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.curvature.eigenvalues.krylov import KrylovBasis, RitzPairs, Which
from noisekit.curvature.eigenvalues.subsample_start import part_of_the_data
from noisekit.curvature.operators.operator import (
    MatrixLike,
    SymmetricOperator,
    as_operator,
)
from noisekit.curvature.random_vectors import shared_generator

# Fewest steps of the random part of a start.
_MIN_STEPS = 4
# How well the value after the one wanted must be known, in parts of the gap between
# them, so that it does not overtake. Of two values 1 to 5 % apart the lower was
# taken for the top in 11 to 14 of 100 runs at 0.3, in none at 0.05; and at 0.3 in
# about one, where a part of the data was looked at before.
_SETTLED = 0.05
_SETTLED_SCREENED = 0.3
_CAPACITY = 39
_KEPT = 10
_SCREENING_TOL = 0.06


@dataclass(frozen=True, slots=True)
class EigenPairs:
    """Eigenvalues, best first, each with a bound on how wrong it may be.

    Attributes:
        values: ``(k,)``, in double precision, on the CPU. With ``which="BE"`` the
            largest, the smallest, the second largest, the second smallest, ...
        vectors: ``(P, k)``, of unit norm, where the operator is.
        residuals: ``|H v - value v|``: an eigenvalue lies at most this far from the
            value. That it is the largest one is very likely, not certain.
        statuses: Per pair, whether the tolerance was met.
        start: ``(P, j)``: what to start from after the operator has changed a little,
            the vectors and the next one after them.
        num_matvecs: Products with the operator. The first look at an eighth of the
            data is not among them.
        num_screening_matvecs: Products with the Hessian of that eighth.
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    residuals: Tensor
    statuses: tuple[Status, ...]
    start: Tensor = field(repr=False)
    num_matvecs: int
    num_screening_matvecs: int = 0

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

    def __str__(self) -> str:
        """Write what was spent, and each value with its residual and status."""
        spent = f"{self.num_matvecs} products"
        if self.num_screening_matvecs:
            spent += f" and {self.num_screening_matvecs} of an eighth of the data"
        lines = [f"  {self.estimate(i)}" for i in range(len(self.values))]
        return "\n".join([f"eigenvalues after {spent}:", *lines])


def top_eigenpairs(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    k: int = 1,
    *,
    which: Which = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | Literal["random"] | None = None,
    block_size: int = 1,
) -> EigenPairs:
    """Return the ``k`` largest or smallest (algebraic) eigenpairs, by Lanczos.

    The basis is orthogonalised in full, twice, so there are no ghost copies, and is
    restarted from its best vectors at a fixed size: memory is ``k + 45`` vectors beside
    those returned, however many products are made. Of an eigenvalue that
    occurs several times, as many copies as ``block_size`` are found; in matrices that
    are small or of low rank all are.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        k: How many.
        which: ``"LA"`` for the largest, ``"SA"`` for the smallest, ``"BE"`` for both
            ends by turns, out of one basis.
        tol: Wanted accuracy, relative to the estimated norm of ``H``. Of several
            pairs the residuals must be below it, and one value more than asked (at
            both ends one) must have settled. Of one pair, whose error is about the
            squared residual over the gap to the next, that quotient must be, and the
            residual below ten times it.
        max_matvecs: Most products to spend; ``100 + 20 k`` by default.
        generator: Of the random start; fresh entropy by default.
        start: A vector ``(P,)``, or several ``(P, j)``, expected near the wanted
            ones, such as ``start`` of an earlier result. By default a random eighth of
            the data is looked at first, where ``H`` is the Hessian over 1,024
            examples or more that can be taken apart. ``"random"`` does not. Random
            directions over all data are mixed in always.
        block_size: Vectors multiplied at a time. More than 1 is for eigenvalues that
            occur several times or nearly so, and takes more products.

    Returns:
        The pairs. One that stopped at ``max_matvecs`` is ``NOT_CONVERGED``; if a
        product was not finite all are ``DIVERGED`` and NaN.

    Raises:
        UsageError: If an argument is outside what it may be.
    """
    operator = as_operator(H)
    budget = 100 + 20 * k if max_matvecs is None else max_matvecs
    _check_arguments(operator.shape[0], k, which, tol=tol, budget=budget)
    _check_block(block_size, k, budget)
    drawn = shared_generator(generator, operator.ranks, operator.device)
    _check_start(start, operator.shape[0], budget)
    seen = _screened(operator, k, which, drawn) if start is None else None
    near = _near(start if seen is None else seen.vectors, operator)
    basis = KrylovBasis(
        operator,
        which=which,
        capacity=k + _CAPACITY + 2 * (block_size - 1),
        num_kept=k + _KEPT,
        block_size=block_size,
        generator=drawn,
    )
    rule = _StoppingRule(
        k,
        tol,
        num_beyond=2 if which == "BE" else 1,
        min_steps=_min_steps(near, seen, block_size),
        settled=_SETTLED if seen is None else _SETTLED_SCREENED,
    )
    rule.to_the_end = k > 1 and operator.shape[0] <= k + _CAPACITY
    ritz = _run(basis, rule, near, budget)
    if not ritz.finite:
        return _diverged(operator, k, basis.num_matvecs)
    found = basis.vectors(ritz, min(k + 1, len(ritz.values))).to(operator.dtype)
    return EigenPairs(
        values=torch.from_numpy(ritz.values[:k].copy()),
        vectors=found[:, :k],
        residuals=torch.from_numpy(ritz.residuals[:k].copy()),
        statuses=rule.statuses(ritz),
        start=found,
        num_matvecs=basis.num_matvecs,
        num_screening_matvecs=0 if seen is None else seen.num_matvecs,
    )


def _screened(
    operator: SymmetricOperator, k: int, which: Which, drawn: torch.Generator
) -> EigenPairs | None:
    """Rough eigenpairs of a part of the data: somewhere to start from.

    One more than wanted, since those next to each other may have changed places.
    """
    part = part_of_the_data(operator, drawn)
    if part is None:
        return None
    with part:
        pairs = top_eigenpairs(
            part,
            min(k + 1, part.shape[0]),
            which=which,
            tol=_SCREENING_TOL,
            max_matvecs=13 + 3 * k,
            generator=drawn,
            start="random",
        )
    return pairs if bool(pairs.values.isfinite().all()) else None


def _min_steps(near: Tensor, seen: EigenPairs | None, block_size: int) -> int:
    """Fewest steps: each vector known before takes one to be told from the random.

    A look at a part of the data counts for them: it set out from random directions.
    """
    known = near.shape[1] if seen is None else 0
    return _MIN_STEPS + -(-known // block_size)


def _run(
    basis: KrylovBasis, rule: "_StoppingRule", start: Tensor, budget: int
) -> RitzPairs:
    basis.begin(start)
    while True:
        basis.step()
        ritz = basis.ritz()
        spent = basis.num_matvecs + basis.block_size > budget
        if not ritz.finite or spent or rule.satisfied(ritz):
            return ritz
        basis.advance(ritz)


class _StoppingRule:
    """Decides when the wanted Ritz values have settled.

    Attributes:
        to_the_end: Whether to go through the whole space, where copies of an
            eigenvalue show.
    """

    def __init__(
        self, k: int, tol: float, *, num_beyond: int, min_steps: int, settled: float
    ) -> None:
        self._k = k
        self._tol = tol
        self._num_beyond = num_beyond
        self._min_steps = min_steps
        self._settled = settled
        self.to_the_end = False
        self._values_when_invariant: np.ndarray | None = None

    def satisfied(self, ritz: RitzPairs) -> bool:
        if ritz.exhausted:
            return True
        if ritz.invariant:
            return self._nothing_new(ritz)
        # A chain set out anew from an invariant space runs until it is invariant as
        # well: its first values say nothing about the directions to come.
        anew = self._values_when_invariant is not None
        if anew or self.to_the_end or len(ritz.values) < self._k + self._num_beyond:
            return False
        if ritz.num_steps < self._min_steps:
            return False
        return all(self._met(ritz)) and self._beyond_settled(ritz)

    def statuses(self, ritz: RitzPairs) -> tuple[Status, ...]:
        return tuple(Status.OK if m else Status.NOT_CONVERGED for m in self._met(ritz))

    def _met(self, ritz: RitzPairs) -> list[bool]:
        limit = self._tol * ritz.norm
        if ritz.exhausted or ritz.invariant:
            return [True] * self._k
        close = [bool(r <= limit) for r in ritz.residuals[: self._k]]
        if self._k > 1 or close[0] or len(ritz.values) < 2:
            return close
        residual = float(ritz.residuals[0])
        return [residual <= 10 * limit and residual**2 <= limit * ritz.gap]

    def _beyond_settled(self, ritz: RitzPairs) -> bool:
        """Whether the next values, too, are known well enough not to overtake."""
        beyond = ritz.residuals[self._k : self._k + self._num_beyond]
        limit = self._tol * ritz.norm
        most = max(self._settled * ritz.gap, limit) if self._k == 1 else 10 * limit
        return bool((beyond <= most).all())

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
    vectors = vectors.to(operator.device, operator.dtype)
    return EigenPairs(
        values=nothing,
        vectors=vectors,
        residuals=nothing.clone(),
        statuses=(Status.DIVERGED,) * k,
        start=vectors[:, :0],
        num_matvecs=num_matvecs,
    )


def _check_arguments(size: int, k: int, which: str, *, tol: float, budget: int) -> None:
    if not 1 <= k <= size:
        raise UsageError(f"k needs to be between 1 and the size {size}, got {k}.")
    if which not in get_args(Which):
        raise UsageError(
            "which needs to be 'LA' (largest), 'SA' (smallest) or 'BE' (both ends), "
            f"got {which!r}; eigenvalues are ordered with their sign, not by magnitude."
        )
    if which == "BE" and k < 2:
        raise UsageError(
            f"which='BE' needs k of at least 2, one for each end, got {k}; use 'LA' "
            "for the largest alone."
        )
    if not 0.0 < tol < 1.0:
        raise UsageError(f"tol needs to be between 0 and 1, got {tol}.")
    if budget < k:
        raise UsageError(
            f"max_matvecs needs to be at least k={k}, got {budget}; a first value "
            "takes about 8 products, each further one about 2."
        )


def _check_block(block_size: int, k: int, budget: int) -> None:
    if block_size < 1:
        raise UsageError(f"block_size needs to be at least 1, got {block_size}.")
    whole_blocks = -(-k // block_size) * block_size
    if budget < whole_blocks:
        raise UsageError(
            f"max_matvecs needs room for {whole_blocks} products, whole blocks of "
            f"block_size={block_size} for k={k}, got {budget}; raise it."
        )


def _near(start: Tensor | str | None, operator: SymmetricOperator) -> Tensor:
    """The vectors to start near, ``(P, j)``."""
    size = operator.shape[0]
    if not isinstance(start, Tensor):
        return torch.empty(size, 0, dtype=operator.dtype, device=operator.device)
    return start.reshape(size, -1).to(operator.device, operator.dtype)


def _check_start(start: Tensor | str | None, size: int, budget: int) -> None:
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
    norms = start.norm(dim=0)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise UsageError("start needs finite vectors that are not zero, got others.")
