"""Traces and diagonals from products with random signs, each with its error."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.curvature.operator import MatrixLike, SymmetricOperator, as_operator
from noisekit.curvature.random_vectors import entropy_generator, sign_vector


@dataclass(frozen=True, slots=True)
class DiagonalEstimate:
    """The diagonal of an operator, entry by entry, with its error.

    Attributes:
        values: ``(P,)`` estimates of ``H_ii``.
        stderr: ``(P,)`` standard errors over probes.
        num_matvecs: Products spent, one per probe.
    """

    values: Tensor
    stderr: Tensor
    num_matvecs: int


def trace(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    *,
    num_matvecs: int = 32,
    method: Literal["hutchinson"] = "hutchinson",
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate the trace as the mean of :math:`z^\top H z` over random signs.

    The number of probes is fixed beforehand: stopping when the running mean looks
    steady stops early by luck and biases the result.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        num_matvecs: Probes, one product each.
        method: The only one so far.
        generator: Of the signs; fresh entropy by default.

    Returns:
        The mean, with its standard error over probes and ``num_matvecs - 1`` degrees
        of freedom.

    Raises:
        UsageError: If fewer than 2 products are given, or ``method`` is unknown.

    Source:
        Hutchinson 1989, "A stochastic estimator of the trace of the influence matrix
        for Laplacian smoothing splines".
    """
    if method != "hutchinson":
        raise UsageError(f"method needs to be 'hutchinson', got {method!r}.")
    return _mean_quadratic_form(as_operator(H), None, num_matvecs, generator)


def weighted_trace(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    weights: Tensor,
    *,
    num_matvecs: int = 32,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Estimate :math:`\sum_i w_i^2 H_{ii}`, which rescaling of layers leaves alone.

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
    return _mean_quadratic_form(operator, weights, num_matvecs, generator)


def diagonal(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    *,
    num_matvecs: int = 32,
    generator: torch.Generator | None = None,
) -> DiagonalEstimate:
    r"""Estimate the diagonal as the mean of :math:`z \odot H z` over random signs.

    Raises:
        UsageError: If fewer than 2 products are given.

    Source:
        Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix".
    """
    operator = as_operator(H)
    _check_probes(num_matvecs)
    drawn = entropy_generator(generator)
    dtype = torch.promote_types(operator.dtype, torch.float32)
    mean = torch.zeros(operator.shape[0], dtype=dtype, device=operator.device)
    squares = torch.zeros_like(mean)
    for i in range(num_matvecs):
        signs = sign_vector(len(mean), drawn, (operator.dtype, operator.device))
        sample = (signs * (operator @ signs)).to(dtype)
        change = sample - mean
        mean += change / (i + 1)
        squares += change * (sample - mean)
    variance = squares / (num_matvecs - 1)
    return DiagonalEstimate(mean, (variance / num_matvecs).sqrt(), num_matvecs)


def _mean_quadratic_form(
    operator: SymmetricOperator,
    weights: Tensor | None,
    num_matvecs: int,
    generator: torch.Generator | None,
) -> Estimate:
    _check_probes(num_matvecs)
    drawn = entropy_generator(generator)
    like = (operator.dtype, operator.device)
    samples = []
    for _ in range(num_matvecs):
        probe = sign_vector(operator.shape[0], drawn, like)
        if weights is not None:
            probe = probe * weights.to(probe)
        product = operator @ probe
        samples.append((probe.double() * product.double()).sum())
    values = torch.stack(samples)
    mean, spread = float(values.mean()), float(values.std())
    return Estimate(
        value=mean,
        stderr=spread / math.sqrt(num_matvecs),
        error_source=ErrorSource.PROBES,
        num_samples=num_matvecs,
        dof=num_matvecs - 1,
        status=Status.OK if math.isfinite(mean) else Status.DIVERGED,
        num_matvecs=num_matvecs,
    )


def _check_probes(num_matvecs: int) -> None:
    if num_matvecs < 2:
        raise UsageError(
            f"num_matvecs needs to be at least 2 for an error estimate, got "
            f"{num_matvecs}."
        )
