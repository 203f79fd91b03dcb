"""Eigenvalues of a model's Hessian, as measures of sharpness."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.eigenvalues.lanczos import EigenPairs, top_eigenpairs
from noisekit.curvature.eigenvalues.pyhessian import pyhessian_top_eigenvalue
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.operators.preconditioned import ScaledOperator
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import (
    WithDataError,
    curvature_parts,
    data_stderr_at,
    over_data,
)
from noisekit.sharpness.rescaling.chains import layers_before_norms
from noisekit.sharpness.rescaling.rescaling import Rescaling, rescaled_copy

EigenMethod = Literal["lanczos", "pyhessian"]


def lambda_max(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    method: EigenMethod = "lanczos",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    """Return the largest (algebraic) eigenvalue of the Hessian of the loss.

    This is what "sharpness" means without an adjective. It is not invariant: a ReLU
    network has twins of the same function and any larger value, and weights before a
    BatchNorm have one that falls with their squared norm. Compare it at equal
    training loss only.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        method: ``"lanczos"``, or ``"pyhessian"`` for that package's power iteration.
        tol: Wanted relative accuracy.
        max_matvecs: Most Hessian-vector products to spend.
        generator: Source of the random start; by default a fresh one.
        data_error: Whether to measure how far other data of the same kind would move
            it, from ``v' H_b v`` of each batch, at about one more product.

    Returns:
        The eigenvalue [loss/param²], with the residual ``|H v - value v|`` as
        ``bound``; ``Status.NOT_CONVERGED`` where the budget ended first. With
        ``data_error`` a first-order standard error over batches comes beside it: that
        of the curvature along ``v``, which was chosen on the same data.

    Raises:
        UsageError: If ``method`` is unknown or another argument is out of range.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    if method == "pyhessian" and data_error:
        raise UsageError(
            "data_error needs method='lanczos', got 'pyhessian', of which no "
            "eigenvector is kept."
        )
    if method == "pyhessian":
        return pyhessian_top_eigenvalue(
            risk, tol=tol, max_iterations=max_matvecs or 1000, generator=generator
        )
    if method != "lanczos":
        raise UsageError(
            f"method needs to be 'lanczos' or 'pyhessian', got {method!r}."
        )
    with HessianOperator(risk) as hessian:
        pairs = top_eigenpairs(
            hessian, tol=tol, max_matvecs=max_matvecs, generator=generator
        )
    direction = pairs.vectors[:, 0] if data_error else None
    found, stderr = _with_data_error(pairs, risk, direction)
    return over_data(found, stderr, risk)


def lambda_min(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    """Return the smallest (algebraic) eigenvalue of the Hessian of the loss.

    Clearly below zero it says that the point is no minimum. ``tol`` is relative to
    the norm of the Hessian, so a value of that order is not told from zero.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        tol: Wanted accuracy, relative to the norm of the Hessian.
        max_matvecs: Most Hessian-vector products to spend.
        generator: Source of the random start; by default a fresh one.
        data_error: Whether to measure how far other data of the same kind would move
            it, at about one more product; see :func:`lambda_max`.

    Returns:
        The eigenvalue [loss/param²], with its residual as ``bound``.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    with HessianOperator(risk) as hessian:
        pairs = top_eigenpairs(
            hessian, which="SA", tol=tol, max_matvecs=max_matvecs, generator=generator
        )
    direction = pairs.vectors[:, 0] if data_error else None
    found, stderr = _with_data_error(pairs, risk, direction)
    return over_data(found, stderr, risk)


def gauge_fixed_lambda_max(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    r"""Return the largest Hessian eigenvalue with rows before BatchNorm at unit norm.

    A row of weights (one output channel) whose output goes into a BatchNorm can have
    any length without a change of the function, and its curvature is proportional to
    one over that length squared. So the raw eigenvalue also counts how far training
    has lengthened the rows. Here each such row, with its bias, is divided by its norm,
    the running statistics follow, and the eigenvalue is that of the Hessian **with
    respect to the rescaled parameters**: of :math:`D H D`, where ``D`` has the norms
    on the diagonal and 1 for all other parameters. Rows are found in any model, by
    running it. The model itself is not changed.

    With ``bn="batch"`` the constant that BatchNorm adds to the variance is taken as
    scaled along with the row.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        tol: Wanted relative accuracy.
        max_matvecs: Most Hessian-vector products to spend.
        generator: Source of the random start; by default a fresh one.
        data_error: Whether to measure how far other data of the same kind would move
            it, at about one more product; see :func:`lambda_max`.

    Returns:
        The eigenvalue [loss], with its residual as ``bound``.

    Raises:
        UsageError: If no weights feed a BatchNorm, a row is zero, or the rescaled
            network has not the same function.

    Source:
        van Laarhoven 2017, arXiv:1706.05350, section 2, for the dependence on length.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    found, stderr = gauge_fixed_with_data_error(
        risk,
        tol=tol,
        max_matvecs=max_matvecs,
        generator=entropy_generator(generator),
        data_error=data_error,
    )
    return over_data(found, stderr, risk)


def gauge_fixed_with_data_error(
    risk: EmpiricalRisk,
    *,
    tol: float,
    max_matvecs: int | None,
    generator: torch.Generator,
    data_error: bool = True,
) -> WithDataError:
    """Return the eigenvalue at unit rows, and its error over batches.

    Raises:
        UsageError: If no weights feed a BatchNorm, a row is zero, or the rescaled
            network has not the same function.
    """
    batch = next(iter(risk.batches))
    unit_rows = _unit_rows(risk, batch)
    rescaled_copy(risk.model, unit_rows, batch=batch, bn=risk.bn)
    lengths = 1 / unit_rows.vector(risk.layout)
    with HessianOperator(risk) as hessian:
        operator = ScaledOperator(hessian, lengths)
        pairs = top_eigenpairs(
            operator, tol=tol, max_matvecs=max_matvecs, generator=generator
        )
    # An eigenvector of D H D is, times D, the direction of that curvature in H.
    moved = pairs.vectors[:, 0] * lengths.to(pairs.vectors)
    return _with_data_error(pairs, risk, moved if data_error else None)


def _with_data_error(
    pairs: EigenPairs, risk: EmpiricalRisk, direction: Tensor | None
) -> WithDataError:
    """The eigenvalue, and its error over batches where a direction is given."""
    found = pairs.estimate()
    if direction is None or found.status is Status.DIVERGED:
        return found, None
    stderr = data_stderr_at(risk, lambda data: curvature_parts(data, direction))
    if stderr is None:
        return found, None
    return replace(found, num_matvecs=found.num_matvecs + 1), stderr


def _unit_rows(risk: EmpiricalRisk, batch: Batch) -> Rescaling:
    """The rescaling that gives every row before a BatchNorm the norm 1."""
    scales = layers_before_norms(risk.model, batch)
    if not scales:
        raise UsageError(
            "gauge_fixed_lambda_max needs weights whose output goes straight into a "
            f"BatchNorm, got none in {type(risk.model).__name__}; use lambda_max."
        )
    result = Rescaling({})
    for scale in scales:
        weight = risk.model.get_parameter(f"{scale.source}.weight").detach()
        norms = weight.flatten(1).norm(dim=1)
        if not bool((norms > 0).all()):
            row = int(norms.argmin())
            raise UsageError(
                "rows of weights before a BatchNorm need a length to be scaled to 1, "
                f"got only zeros in row {row} of {scale.source}.weight; prune it."
            )
        result = result.then(scale.rescaling(1 / norms))
    return result
