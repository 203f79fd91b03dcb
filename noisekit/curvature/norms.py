"""Frobenius norm, participation ratio and effective dimension, from random probes."""

import math
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.settings import NumSamples, Positive, PositiveInt
from noisekit.curvature.operators.operator import (
    MatrixLike,
    SymmetricOperator,
    as_operator,
)
from noisekit.curvature.quadratic_forms import Probes, mean_estimate
from noisekit.curvature.quadrature import spectral_quadrature
from noisekit.curvature.random_vectors import Probe

# Eigenvalues further below zero than this part of the shift make the sum of
# lambda / (lambda + shift) depend on where they are, not on how many they are.
_NEGATIVE_SHARE = 0.1


@checked
def frobenius_norm(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    *,
    num_matvecs: NumSamples = 32,
    probe: Probe = "rademacher",
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate :math:`\|H\|_F` from :math:`\mathbb E |H z|^2 = \|H\|_F^2`.

    The square is unbiased; the root has the standard error of the square over twice
    the root.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        num_matvecs: Probes, one product each.
        probe: Random signs or normal vectors.
        generator: Of the probes; fresh entropy by default.

    Raises:
        UsageError: If fewer than 2 products are given.

    Source:
        Hutchinson 1989, applied to the square of the operator.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> H = torch.diag(torch.tensor([3.0, 4.0]))
        >>> round(float(nk.frobenius_norm(H, num_matvecs=8, generator=generator)), 4)
        5.0
    """
    probes = Probes(as_operator(H), generator, probe=probe)
    squares = probes.sums(num_matvecs, lambda _, product: product.square())
    square = mean_estimate(squares, num_matvecs)
    root = math.sqrt(square.value) if square.value >= 0 else math.nan
    error = 0.0 if square.stderr is None else square.stderr
    return Estimate(
        value=root,
        stderr=error / (2 * root) if root > 0 else error,
        error_source=ErrorSource.PROBES,
        num_samples=num_matvecs,
        dof=num_matvecs - 1,
        status=square.status,
        num_matvecs=num_matvecs,
    )


@checked
def participation_ratio(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    *,
    num_matvecs: Annotated[int, Ge(3), Le(10**12)] = 32,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate :math:`(\sum \lambda)^2 / \sum \lambda^2`, an effective rank.

    It counts eigenvalues where all that are not zero are alike. Ask it of an operator
    without negative eigenvalues, such as Gauss-Newton: elsewhere they cancel in the
    numerator only. Both parts come from the same probes; the bias of the
    squared mean is taken off, and the error is by the jackknife over probes.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        num_matvecs: Probes, one product each.
        generator: Of the probes; fresh entropy by default.

    Returns:
        The ratio; ``NO_SIGNAL`` and NaN of a zero operator.

    Raises:
        UsageError: If fewer than 3 products are given.

    Source:
        Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and
        measurement", equation 1, for the ratio.
    """
    probes = Probes(as_operator(H), generator)
    parts = [
        torch.stack([(z * p).sum(0), p.square().sum(0)])
        for z, p in (
            (block.double(), products.double())
            for block, products in probes.blocks(num_matvecs)
        )
    ]
    forms, squares = torch.cat(parts, 1).cpu().numpy()
    whole = _ratio(forms, squares)
    keep = ~np.eye(num_matvecs, dtype=bool)
    left_out = np.array([_ratio(forms[rows], squares[rows]) for rows in keep])
    spread = math.sqrt((num_matvecs - 1) * float(left_out.var()))
    status = Status.OK if math.isfinite(whole) else Status.NO_SIGNAL
    if not np.isfinite(squares).all():
        status = Status.DIVERGED
    return Estimate(
        value=whole,
        stderr=spread,
        error_source=ErrorSource.PROBES,
        num_samples=num_matvecs,
        dof=num_matvecs - 1,
        status=status,
        num_matvecs=num_matvecs,
    )


@checked
def effective_dimension(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    shift: Positive,
    *,
    num_probes: NumSamples = 8,
    num_steps: PositiveInt = 20,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate :math:`\sum_i \lambda_i / (\lambda_i + z)`, by Lanczos quadrature.

    It counts the eigenvalues that are large against the shift ``z``.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        shift: ``z``, such as a prior precision or a weight decay [loss/param²].
        num_probes: Random vectors.
        num_steps: Most products for each.
        generator: Of the vectors; fresh entropy by default.

    Returns:
        The number, with its standard error over probes. ``NOT_COMPARABLE`` where
        there are negative eigenvalues beyond a tenth of the shift.

    Raises:
        UsageError: If ``shift`` is not positive, or there are fewer than 2 probes.

    Source:
        MacKay 1992, "Bayesian interpolation", section 4.3; Maddox et al. 2020,
        arXiv:2003.02139, section 3.
    """
    quadrature = spectral_quadrature(
        H, num_probes=num_probes, num_steps=num_steps, generator=generator
    )
    nodes = quadrature.nodes
    negative = bool((nodes < -_NEGATIVE_SHARE * shift).any())
    mean = quadrature.means(nodes / np.where(nodes == -shift, np.nan, nodes + shift))
    return Estimate(
        value=quadrature.size * mean.value,
        stderr=None if mean.stderr is None else quadrature.size * mean.stderr,
        error_source=mean.error_source,
        num_samples=mean.num_samples,
        dof=mean.dof,
        status=Status.NOT_COMPARABLE if negative else mean.status,
        num_matvecs=quadrature.num_matvecs,
    )


def _ratio(forms: np.ndarray, squares: np.ndarray) -> float:
    """Squared mean over mean square, without the bias of the squared mean."""
    mean_square = float(squares.mean())
    if mean_square == 0.0:
        return math.nan
    count = len(forms)
    return float(forms.mean() ** 2 - forms.var(ddof=1) / count) / mean_square
