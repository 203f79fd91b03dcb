"""The largest or smallest eigenvalues of a symmetric operator."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.settings import Fraction, Hint, PositiveInt
from noisekit.curvature.eigenvalues.deflation import DeflatedOperator, End
from noisekit.curvature.eigenvalues.krylov import KrylovBasis, RitzPairs, Which
from noisekit.curvature.eigenvalues.stopping import (
    SETTLED,
    SETTLED_SUBSAMPLED,
    StoppingRule,
)
from noisekit.curvature.eigenvalues.subsample_start import subsampled_hessian
from noisekit.curvature.eigenvalues.validation import (
    check_arguments,
    check_block,
    check_start,
)
from noisekit.curvature.operators.operator import (
    MatrixLike,
    SymmetricOperator,
    as_operator,
)
from noisekit.curvature.random_vectors import shared_generator

# Fewest steps of the random part of a start.
_MIN_STEPS = 4
# The basis holds k + 39 vectors and a restart keeps k + 10 Ritz vectors, so that 29
# products lie between two restarts.
_CAPACITY = 39
_KEPT = 10
# Accuracy of the warm start: eigenvalues of a subsample differ from the data's by more.
_SUBSAMPLE_TOL = 0.06
# Fewest products that resolve the largest eigenvalue left after a deflation.
_LEAST_SEARCH = 8
# A first, rough search for copies: most find none, and end there.
_SEARCH_TOL = 0.01


@dataclass(frozen=True, slots=True)
class EigenPairs:
    """Eigenvalues, the wanted end first, each with an error bound.

    Attributes:
        values: ``(k,)``, in double precision, on the CPU. With ``which="BE"`` the
            largest, the smallest, the second largest, the second smallest, ...
        vectors: ``(P, k)``, of unit norm, where the operator is.
        residuals: ``|H v - value v|``: an eigenvalue lies at most this far from the
            value. That it is the largest one is very likely, not certain.
        statuses: Per pair, whether the tolerance was met.
        start: ``(P, j)``: what to start from after the operator has changed a little,
            the vectors and the next one after them.
        num_matvecs: Products with the operator, without those of the warm start.
        num_screening_matvecs: Products with the Hessian over an eighth of the data,
            for the warm start.
        num_copy_matvecs: Products, among all, that looked for further copies of the
            values, for ``k`` above 1.
        copies_counted: Whether that search ended: if not, a value may occur more often
            than it is listed, and push out the last ones.
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    residuals: Tensor
    statuses: tuple[Status, ...]
    start: Tensor = field(repr=False)
    num_matvecs: int
    num_screening_matvecs: int = 0
    num_copy_matvecs: int = 0
    copies_counted: bool = True

    @property
    def converged(self) -> bool:
        """Whether all pairs met the tolerance."""
        return all(status is Status.OK for status in self.statuses)

    @checked
    def estimate(self, index: int = 0) -> Estimate:
        """Return one eigenvalue with its residual bound and status.

        Raises:
            UsageError: If there is none of that index.
        """
        if not -len(self.values) <= index < len(self.values):
            raise UsageError(
                f"index needs to be below the number of pairs, {len(self.values)}, "
                f"got {index}; raise k of top_eigenpairs."
            )
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
        if self.converged and not self.copies_counted:
            lines.append("  each at least as often as listed; raise max_matvecs")
        return "\n".join([f"eigenvalues after {spent}:", *lines])


_ORDER = Hint(advice="eigenvalues are ordered with their sign, not by magnitude")


@checked
def top_eigenpairs(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    k: PositiveInt = 1,
    *,
    which: Annotated[Which, _ORDER] = "LA",
    tol: Fraction = 1e-3,
    max_matvecs: PositiveInt | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | Literal["random"] | None = None,
    block_size: PositiveInt = 1,
) -> EigenPairs:
    """Return the ``k`` largest or smallest (algebraic) eigenpairs, by Lanczos.

    The basis is reorthogonalized in full, twice, so there are no ghost copies, and is
    restarted from its best vectors at a fixed size. Memory is ``k + 45`` vectors beside
    the ``k + 1`` returned, however many products are made: 30 eigenvalues of 10 million
    float32 parameters hold 4.2 GB besides the graphs.

    A Krylov space contains one vector of the eigenspace of a multiple eigenvalue. Where
    ``k`` is above 1 the converged vectors are deflated and the rest is searched for
    further copies, until it has no eigenvalue above the last of them; a search takes
    nine to fifteen products.

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
            ones, such as ``start`` of an earlier result. By default, if ``H`` is the
            Hessian over 1,024 or more examples that can be evaluated separately, the
            eigenvectors over a random eighth of them; ``"random"`` turns that off.
            Random directions are always mixed in.
        block_size: Vectors multiplied at a time. More than 1 is for eigenvalues that
            nearly coincide, and takes more products.

    Returns:
        The pairs. One that stopped at ``max_matvecs`` is ``NOT_CONVERGED``; if a
        product was not finite all are ``DIVERGED`` and NaN.

    Raises:
        UsageError: If an argument is out of range.

    Source:
        Wu and Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue
        problems"; Golub and Underwood 1977 for blocks.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> H = torch.diag(torch.arange(1.0, 101.0))
        >>> pairs = top_eigenpairs(H, 3, generator=generator)
        >>> [round(float(value), 2) for value in pairs.values]
        [100.0, 99.0, 98.0]
        >>> pairs.converged
        True
    """
    operator = as_operator(H)
    budget = 100 + 20 * k if max_matvecs is None else max_matvecs
    check_arguments(operator.shape[0], k, which, tol=tol, budget=budget)
    check_block(block_size, k, budget)
    drawn = shared_generator(generator, operator.ranks, operator.device)
    check_start(start, operator.shape[0], budget)
    warm = _subsample_start(operator, k, which, drawn) if start is None else None
    near = _start_vectors(start if warm is None else warm.vectors, operator)
    basis = KrylovBasis(
        operator,
        which=which,
        capacity=k + _CAPACITY + 2 * (block_size - 1),
        num_kept=k + _KEPT,
        block_size=block_size,
        generator=drawn,
    )
    rule = StoppingRule(
        k,
        tol,
        num_beyond=2 if which == "BE" else 1,
        min_steps=_min_steps(near, warm, block_size),
        settled=SETTLED if warm is None else SETTLED_SUBSAMPLED,
    )
    rule.to_the_end = k > 1 and operator.shape[0] <= k + _CAPACITY
    ritz = _run(basis, rule, near, budget)
    if not ritz.finite:
        return _diverged(operator, k, basis.num_matvecs)
    vectors = basis.vectors(ritz, min(k + 1, len(ritz.values))).to(operator.dtype)
    pairs = EigenPairs(
        values=torch.from_numpy(ritz.values[:k].copy()),
        vectors=vectors[:, :k],
        residuals=torch.from_numpy(ritz.residuals[:k].copy()),
        statuses=rule.statuses(ritz),
        start=vectors,
        num_matvecs=basis.num_matvecs,
        num_screening_matvecs=0 if warm is None else warm.num_matvecs,
    )
    del basis  # frees its memory for the search for copies
    every_copy_is_there = k == 1 or ritz.exhausted or ritz.invariant
    if every_copy_is_there or not pairs.converged:
        pairs = replace(pairs, copies_counted=every_copy_is_there)
    else:
        pairs = _with_copies(operator, pairs, which, tol, budget, drawn)
    return _in_double_precision(operator, pairs, tol * ritz.norm)


def _with_copies(
    operator: SymmetricOperator,
    pairs: EigenPairs,
    which: Which,
    tol: float,
    budget: int,
    drawn: torch.Generator,
) -> EigenPairs:
    """Insert the copies of multiple eigenvalues that one Krylov space cannot contain.

    Alternates deflation of all known vectors with a search for the largest remaining
    eigenvalue, until that lies below the last wanted one.
    """
    ends: tuple[End, ...] = ("LA", "SA") if which == "BE" else (which,)
    known, residuals = pairs.vectors, pairs.residuals  # (P, j) and (j,)
    limit = tol * float(pairs.values.abs().max())
    for first, end in enumerate(ends):
        # Of "BE" the even entries are the largest values, the odd ones the smallest.
        mine = slice(first, None, len(ends))
        # A copy of an end's only value would change nothing.
        while len(pairs.values[mine]) > 1:
            # Moved to twice the norm, so that no estimate of it falls short.
            rest = DeflatedOperator(operator, known, end, 2 * limit / tol)
            worst = float(pairs.values[mine][-1])
            near: Tensor | Literal["random"] = "random"
            # Rough first; only a value that would be inserted is refined to tol.
            for accuracy in (max(tol, _SEARCH_TOL), tol):
                left = budget - pairs.num_matvecs
                if left < _LEAST_SEARCH:
                    return replace(pairs, copies_counted=False)
                result = top_eigenpairs(
                    rest,
                    which=end,
                    tol=accuracy,
                    max_matvecs=left,
                    generator=drawn,
                    start=near,
                )
                pairs = replace(
                    pairs,
                    num_matvecs=pairs.num_matvecs + result.num_matvecs,
                    num_copy_matvecs=pairs.num_copy_matvecs + result.num_matvecs,
                )
                ahead = float(result.values[0]) - worst
                ahead = ahead if end == "LA" else -ahead
                if ahead <= limit:
                    break
                near = result.start
            if not result.converged:
                return replace(pairs, copies_counted=False)
            if ahead <= limit:
                break
            # x is orthogonal to V, so that A x = rest x + V V' A x, where the last term
            # is bounded by the residuals of V: |V' A x| = |(A V - V D)' x|. The two are
            # orthogonal, and add in squares.
            missed = residuals.square().sum()
            residual = (result.residuals.square() + missed).sqrt()
            known = torch.cat([known, result.vectors], 1)
            residuals = torch.cat([residuals, residual])
            pairs = _inserted(pairs, mine, end, replace(result, residuals=residual))
    return pairs


def _inserted(pairs: EigenPairs, mine: slice, end: End, new: EigenPairs) -> EigenPairs:
    """Insert a pair among those of one end, in place of the last of them."""
    values = torch.cat([pairs.values[mine], new.values])
    order = values.argsort(descending=end == "LA", stable=True)[:-1]
    whole, vectors = pairs.values.clone(), pairs.vectors.clone()
    residuals, statuses = pairs.residuals.clone(), list(pairs.statuses)
    whole[mine] = values[order]
    residuals[mine] = torch.cat([residuals[mine], new.residuals])[order]
    columns = torch.cat([vectors[:, mine], new.vectors], 1)
    vectors[:, mine] = columns[:, order.to(columns.device)]
    both = [*statuses[mine], *new.statuses]
    statuses[mine] = [both[i] for i in order.tolist()]
    return replace(
        pairs,
        values=whole,
        vectors=vectors,
        residuals=residuals,
        statuses=tuple(statuses),
        start=torch.cat([vectors, pairs.vectors[:, -1:]], 1),
    )


def _in_double_precision(
    operator: SymmetricOperator, pairs: EigenPairs, limit: float
) -> EigenPairs:
    """Recompute residuals with products in double precision, where rounding matters.

    The operator decides where. Single-precision products repeat the same rounding
    errors, so that residuals computed from them do not contain them.
    """
    products = operator.products_in_double(pairs.vectors)
    if products is None:
        return pairs
    vectors = pairs.vectors.double()
    gaps = (products - vectors * pairs.values.to(vectors)).norm(dim=0).cpu()
    too_far = gaps > pairs.residuals + limit
    return replace(
        pairs,
        residuals=torch.maximum(pairs.residuals, gaps),
        statuses=tuple(
            Status.NOT_CONVERGED if beyond else status
            for beyond, status in zip(too_far.tolist(), pairs.statuses, strict=True)
        ),
        num_matvecs=pairs.num_matvecs + pairs.vectors.shape[1],
    )


def _subsample_start(
    operator: SymmetricOperator, k: int, which: Which, drawn: torch.Generator
) -> EigenPairs | None:
    """Rough eigenpairs over a subsample of the data, as a warm start.

    One more than wanted, since neighbours may have changed places.
    """
    part = subsampled_hessian(operator, drawn)
    if part is None:
        return None
    with part:
        pairs = top_eigenpairs(
            part,
            min(k + 1, part.shape[0]),
            which=which,
            tol=_SUBSAMPLE_TOL,
            max_matvecs=13 + 3 * k,
            generator=drawn,
            start="random",
        )
    return pairs if bool(pairs.values.isfinite().all()) else None


def _min_steps(near: Tensor, warm: EigenPairs | None, block_size: int) -> int:
    """Fewest steps: one more per start vector, to separate it from the random part.

    A subsampled start replaces these steps: it already mixed in random directions.
    """
    known = near.shape[1] if warm is None else 0
    return _MIN_STEPS + -(-known // block_size)


def _run(
    basis: KrylovBasis, rule: StoppingRule, start: Tensor, budget: int
) -> RitzPairs:
    basis.begin(start)
    while True:
        basis.step()
        ritz = basis.ritz()
        spent = basis.num_matvecs + basis.block_size > budget
        if not ritz.finite or spent or rule.satisfied(ritz):
            return ritz
        basis.advance(ritz)


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


def _start_vectors(start: Tensor | str | None, operator: SymmetricOperator) -> Tensor:
    """The start vectors as columns ``(P, j)``, none by default."""
    size = operator.shape[0]
    if not isinstance(start, Tensor):
        return torch.empty(size, 0, dtype=operator.dtype, device=operator.device)
    return start.reshape(size, -1).to(operator.device, operator.dtype)
