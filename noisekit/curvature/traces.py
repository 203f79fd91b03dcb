"""Traces and diagonals from products with random probes, each with its error."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.settings import NumSamples, Positive, check_settings
from noisekit.curvature.operators.operator import (
    MatrixLike,
    SymmetricOperator,
    as_operator,
)
from noisekit.curvature.quadratic_forms import (
    Probes,
    mean_estimate,
    two_stage_estimate,
)
from noisekit.curvature.random_vectors import Probe
from noisekit.curvature.xtrace import exchangeable_trace

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]

# Two samples give an error; Hutch++ spends a third on each of its parts, and XTrace a
# half on three probes or more.
_MIN_MATVECS = {"hutchinson": 2, "hutch++": 6, "xtrace": 6}
# Directions of Hutch++ where the number of products is not known beforehand.
_TARGET_SKETCH = 10


@dataclass(frozen=True, slots=True)
class DiagonalEstimate:
    """The diagonal of an operator, entry by entry, with its error.

    Attributes:
        values: ``(P,)`` estimates of ``H_ii``.
        stderr: ``(P,)`` standard errors over probes.
        num_matvecs: Products spent, one per probe.
    """

    values: Tensor = field(repr=False)
    stderr: Tensor = field(repr=False)
    num_matvecs: int

    def __str__(self) -> str:
        """Write the number of entries, their range and their median error."""
        low, high = (float(v) for v in self.values.aminmax())
        return (
            f"diagonal of {len(self.values)} entries from {low:.4g} to {high:.4g}, "
            f"median error {float(self.stderr.median()):.2g}, "
            f"{self.num_matvecs} products"
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A standard error to reach.

    Attributes:
        stderr: How large it may be.
        relative: Whether that is a part of the trace's magnitude, or absolute.
    """

    stderr: Positive
    relative: bool = True

    def __post_init__(self) -> None:
        """Check the standard error."""
        check_settings(self)


@checked
def trace(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    *,
    num_matvecs: NumSamples = 32,
    method: TraceMethod = "hutch++",
    probe: Probe = "rademacher",
    target: Target | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate the trace from products with random vectors.

    ``"hutchinson"`` is the mean of :math:`z^\top H z`. ``"hutch++"`` spends a third of
    the products on finding the dominant directions ``Q`` and a third on the exact
    trace on them, and probes what remains; where a few eigenvalues dominate the error
    is far smaller. ``"xtrace"`` lets each probe find directions for all the others,
    and has its error by the jackknife, which is on the large side. The first holds a
    few vectors, the others a third and a whole of ``num_matvecs``.

    The number of probes is never decided by watching the running mean, which stops
    early by luck. With ``target`` a first round of probes fixes how many follow, and
    the standard error is that of the first round scaled to all, which keeps the
    t-interval exact for normal samples.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        num_matvecs: Products to spend; with ``target``, the most.
        method: How; see above.
        probe: Random signs, which have the smallest variance for matrices with a
            heavy diagonal, or normal vectors.
        target: Stop at this standard error; not for ``"xtrace"``.
        generator: Of the probes; fresh entropy by default.

    Returns:
        The trace, with its standard error over probes. ``NOT_CONVERGED`` where the
        target would take more than ``num_matvecs``.

    Raises:
        UsageError: If there are too few products, or an argument is unknown.

    Source:
        Hutchinson 1989, "A stochastic estimator of the trace of the influence matrix
        for Laplacian smoothing splines"; Meyer et al. 2021, "Hutch++: optimal
        stochastic trace estimation", algorithm 1; Epperly, Tropp and Webber 2024,
        "XTrace: making the most of every sample in stochastic trace estimation",
        section 2.1; Stein 1945, "A two-sample test for a linear hypothesis whose
        power is independent of the variance", for the two rounds.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> vectors, _ = torch.linalg.qr(torch.randn(100, 100, generator=generator))
        >>> H = vectors @ torch.diag(torch.arange(1.0, 101.0)) @ vectors.T
        >>> estimate = nk.trace(H, num_matvecs=60, generator=generator)
        >>> estimate.interval().contains(5050.0)
        True
    """
    operator = as_operator(H)
    _check_trace(num_matvecs, method, probe, target)
    probes = Probes(operator, generator, probe=probe)
    if method == "xtrace":
        return _xtrace(probes, num_matvecs)
    exact = 0.0
    if method == "hutch++":
        sketch = num_matvecs // 3 if target is None else _TARGET_SKETCH
        exact = _dominant_trace(probes, min(sketch, num_matvecs // 3))
    left = num_matvecs - probes.num_matvecs
    if target is None:
        return mean_estimate(
            probes.forms(left), num_matvecs, exact=exact, eps=probes.eps
        )
    return two_stage_estimate(probes, exact, left, (target.stderr, target.relative))


@checked
def weighted_trace(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    weights: Tensor,
    *,
    num_matvecs: NumSamples = 32,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate :math:`\sum_i w_i^2 H_{ii}`, invariant to rescaling of layers.

    Where one layer's weights are multiplied by a factor and the next layer's divided
    by it, so that the function stays, ``H_ii`` changes by the inverse square of
    ``w_i``. The estimate is the mean of ``(w z)' H (w z)`` over random signs ``z``.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        weights: ``w``, of shape ``(P,)``.
        num_matvecs: Probes, one product each.
        generator: Of the signs; fresh entropy by default.

    Raises:
        UsageError: If ``weights`` do not fit, or fewer than 2 products are given.
    """
    operator = as_operator(H)
    if weights.shape != (operator.shape[0],):
        raise UsageError(
            f"weights needs shape ({operator.shape[0]},), got {tuple(weights.shape)}; "
            "risk.vector() has the model's own."
        )
    probes = Probes(operator, generator, weights=weights)
    return mean_estimate(probes.forms(num_matvecs), num_matvecs)


@checked
def diagonal(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    *,
    num_matvecs: NumSamples = 32,
    generator: torch.Generator | None = None,
) -> DiagonalEstimate:
    r"""Estimate the diagonal as the mean of :math:`z \odot H z` over random signs.

    Raises:
        UsageError: If fewer than 2 products are given.

    Source:
        Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix".

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> H = torch.diag(torch.tensor([1.0, 4.0]))
        >>> nk.diagonal(H, num_matvecs=8, generator=generator).values
        tensor([1., 4.])
    """
    operator = as_operator(H)
    probes = Probes(operator, generator)
    dtype = torch.promote_types(operator.dtype, torch.float32)
    mean = torch.zeros(operator.shape[0], dtype=dtype, device=operator.device)
    squares = torch.zeros_like(mean)
    count = 0
    for signs, products in probes.blocks(num_matvecs):
        for sample in (signs * products).to(dtype).unbind(1):
            # Welford's running mean and sum of squares, one vector each.
            count += 1
            change = sample - mean
            mean += change / count
            squares += change * (sample - mean)
    variance = squares / (num_matvecs - 1)
    return DiagonalEstimate(mean, (variance / num_matvecs).sqrt(), num_matvecs)


def _dominant_trace(probes: Probes, rank: int) -> float:
    """Exact trace on the range ``Q`` of a sketch ``H Ω``; later probes leave it out.

    ``tr H = tr(Q' H Q) + tr((I - Q Q') H (I - Q Q'))``, and ``H Ω`` is dominated by the
    eigenvectors of the largest magnitudes, so that the second term varies little.
    """
    # S = H Omega, (P, rank)
    sketch = torch.cat([products for _, products in probes.blocks(rank)], 1)
    if not bool(sketch.isfinite().all()):
        return math.nan
    basis = torch.linalg.qr(sketch.to(probes.wide))[0]  # (P, rank), Q
    products = probes.products(basis)
    # Later probes are (I - Q Q') z, whose forms estimate tr((I - Q Q') H (I - Q Q')).
    probes.leave_out(basis)
    # tr(Q' H Q), summed in double precision: a difference of large terms follows.
    return float((basis.double() * products.double()).sum())


def _xtrace(probes: Probes, num_matvecs: int) -> Estimate:
    half = num_matvecs // 2
    blocks = list(probes.blocks(half))
    tests = torch.cat([block for block, _ in blocks], 1)  # (P, m)
    images = torch.cat([products for _, products in blocks], 1)  # (P, m)
    value = error = math.nan
    if bool(images.isfinite().all()):
        value, error = exchangeable_trace(
            tests, images, probes.products, eps=probes.eps
        )
    return Estimate(
        value=value,
        stderr=math.hypot(error, probes.eps * value),
        error_source=ErrorSource.PROBES,
        num_samples=half,
        dof=half - 1,
        status=Status.OK if math.isfinite(value) else Status.DIVERGED,
        num_matvecs=probes.num_matvecs,
    )


def _check_trace(
    num_matvecs: int, method: str, probe: str, target: Target | None
) -> None:
    least = _MIN_MATVECS[method] * (1 if target is None else 3)
    if num_matvecs < least:
        raise UsageError(
            f"num_matvecs needs to be at least {least} for an error estimate by "
            f"{method!r}, got {num_matvecs}."
        )
    if target is None:
        return
    if method == "xtrace":
        raise UsageError(
            "a target needs method 'hutch++' or 'hutchinson', got 'xtrace', whose "
            "probes all depend on how many there are."
        )
