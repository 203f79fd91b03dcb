"""Sums over the whole spectrum, as measures of sharpness."""

from collections.abc import Iterable

import torch
from torch import nn

from noisekit.core.batches import Batch
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.operators.ggn import GGNOperator
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import over_data
from noisekit.sharpness.measures.spectral_sums import (
    dimension_with_data_error,
    frobenius_with_data_error,
    trace_with_data_error,
    weighted_trace_with_data_error,
)


def hessian_trace(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    num_matvecs: int = 32,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    """Return the trace of the Hessian, the sum of its eigenvalues.

    Negative curvature counts against positive. It is not invariant under rescalings
    that keep a ReLU network's function; :func:`weighted_hessian_trace` is.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        num_matvecs: Random probes, one Hessian product each.
        generator: Source of the random signs; by default a fresh one.
        data_error: Whether to count in how far other data of the same kind would move
            it, from the batches' parts of the same products, at no extra cost.

    Returns:
        The trace [loss/param²], with its standard error over probes, and
        over data where asked for.

    Raises:
        UsageError: If fewer than 2 products are given.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    with HessianOperator(risk) as hessian:
        found, stderr = trace_with_data_error(
            hessian, num_matvecs=num_matvecs, generator=entropy_generator(generator)
        )
    return over_data(found, stderr if data_error else None, risk)


def weighted_hessian_trace(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    num_matvecs: int = 32,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    r"""Return :math:`\sum_i w_i^2 H_{ii}`, the trace in units of the weights.

    Rescalings of layers or neurons that keep a ReLU network's function do not change
    it, since they scale a weight and its curvature inversely.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        num_matvecs: Random probes, one Hessian product each.
        generator: Source of the random signs; by default a fresh one.
        data_error: Whether to count in how far other data of the same kind would move
            it, from the batches' parts of the same products, at no extra cost.

    Returns:
        The sum [loss], with its standard error over probes, and
        over data where asked for.

    Raises:
        UsageError: If fewer than 2 products are given.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    with HessianOperator(risk) as hessian:
        found, stderr = weighted_trace_with_data_error(
            hessian, num_matvecs=num_matvecs, generator=entropy_generator(generator)
        )
    return over_data(found, stderr if data_error else None, risk)


def hessian_frobenius_norm(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    num_matvecs: int = 32,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    r"""Return :math:`\|H\|_F`, the root of the sum of squared Hessian eigenvalues.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        num_matvecs: Random probes, one Hessian product each.
        generator: Source of the random signs; by default a fresh one.
        data_error: Whether to count in how far other data of the same kind would move
            it, to first order, at about the same cost again.

    Returns:
        The norm [loss/param²], with its standard error over probes, and
        over data where asked for.

    Raises:
        UsageError: If fewer than 2 products are given.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    with HessianOperator(risk) as hessian:
        found, stderr = frobenius_with_data_error(
            hessian,
            num_matvecs=num_matvecs,
            generator=entropy_generator(generator),
            data_error=data_error,
        )
    return over_data(found, stderr, risk)


def effective_dimension(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    shift: float = 1e-2,
    num_probes: int = 8,
    num_steps: int = 20,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    r"""Return how many directions are curved: :math:`\sum_i \lambda_i/(\lambda_i+z)`.

    The eigenvalues are those of the Gauss-Newton matrix, which has no negative ones;
    of the Hessian the sum is not a count.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        shift: ``z``: curvature that counts as a half [loss/param²], such as a weight
            decay. Only values at the same shift can be compared.
        num_probes: Random vectors.
        num_steps: Most products for each.
        generator: Source of the vectors; by default a fresh one.
        data_error: Whether to count in how far other data of the same kind would move
            it, to first order, at about the same cost again.

    Returns:
        The number of directions, with its standard error over probes, and
        over data where asked for.

    Raises:
        UsageError: If an argument is out of range, or the loss is not convex in the
            outputs.

    Source:
        MacKay 1992, "Bayesian interpolation"; Maddox et al. 2020, arXiv:2003.02139.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    with GGNOperator(risk) as gauss_newton:
        found, stderr = dimension_with_data_error(
            gauss_newton,
            shift=shift,
            num_probes=num_probes,
            num_steps=num_steps,
            generator=entropy_generator(generator),
            data_error=data_error,
        )
    return over_data(found, stderr, risk)
