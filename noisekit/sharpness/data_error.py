"""How far a measure would move with other data of the same kind, from its batches."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from noisekit.core.data import HeldBatches
from noisekit.core.distributed import concatenate_over_ranks
from noisekit.core.results import ErrorSource, Estimate, LogRatio, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator
from noisekit.curvature.operators.risk_operator import RiskOperator

WithDataError = tuple[Estimate, float | None]
"""An estimate with its own error, and the error over batches where there is one."""


def batch_shares(risk: EmpiricalRisk) -> Tensor | None:
    """Return each batch's share of the normaliser, in double precision.

    Those of all processes, in the order of the ranks. ``None`` where a process reads
    batches again on each pass, since a shuffling loader then puts other examples
    together. Batches of no weight are left out, as in the risk.
    """
    counted = [count for count in risk.normalisers if count > 0]
    if not isinstance(risk.batches, HeldBatches):
        counted = [math.nan]
    own = torch.tensor(counted, dtype=torch.float64, device=risk.layout.device)
    counts = concatenate_over_ranks(own, risk.ranks).cpu()
    return None if counts.isnan().any() else counts / counts.sum()


def batch_parts(risk: EmpiricalRisk, vector: Tensor | None = None) -> Tensor:
    """Return each batch's part of the risk at ``vector``; they add up to it."""
    with risk.at(vector), torch.no_grad():
        losses = [
            (weight * loss.detach()).double() for weight, loss in risk.batch_losses()
        ]
    return gathered(torch.stack(losses), risk)


def curvature_parts(risk: EmpiricalRisk, vector: Tensor) -> Tensor:
    """Return each batch's part of ``v' H v``, at about three gradients in all.

    With an eigenvector this gives the sampling error of its eigenvalue, to
    first order: the vector itself moves the value to second order only.
    """
    with HessianOperator(risk, form="rebuilt") as hessian:
        weights, forms = hessian.batch_forms(vector)
    return gathered(weights.to(forms.device) * forms, risk)


def gathered(parts: Tensor, risk: EmpiricalRisk) -> Tensor:
    """Return the parts of all processes' batches, in the order of their shares."""
    return concatenate_over_ranks(parts, risk.ranks).cpu()


def data_stderr(parts: Tensor, shares: Tensor | None) -> float | None:
    r"""Return the standard error of a weighted mean from its parts by batch.

    .. math:: s^2 = \frac{B}{B-1} \sum_b (x_b - c_b R)^2, \quad R = \sum_b x_b

    with ``c_b`` the batches' shares: the usual linearised error of a ratio. Batches
    need to be random groups of examples, not for instance sorted by class. ``None``
    of fewer than two batches.

    Source:
        Cochran 1977, "Sampling Techniques", section 2.11.
    """
    if shares is None or len(parts) < 2:
        return None
    # Linearized ratio estimator: x_b = c_b r_b with ratio R = sum x / sum c, sum c = 1.
    residuals = parts - shares * parts.sum()
    num_batches = len(parts)
    return math.sqrt(num_batches / (num_batches - 1) * float(residuals.square().sum()))


def data_stderr_at(
    risk: EmpiricalRisk, parts_at: Callable[[EmpiricalRisk], Tensor]
) -> float | None:
    """Return the error over batches of what ``parts_at`` gives, where there is one."""
    shares = batch_shares(risk)
    if shares is None or len(shares) < 2:
        return None
    return data_stderr(parts_at(risk), shares)


def mean_over_batches(parts: Tensor, shares: Tensor) -> Estimate:
    """Return the sum of the parts with its standard error over batches."""
    value = float(parts.sum())
    stderr = data_stderr(parts, shares)
    return Estimate(
        value,
        stderr=stderr,
        error_source=None if stderr is None else ErrorSource.DATA,
        num_samples=len(parts),
        dof=None if stderr is None else len(parts) - 1,
        status=Status.OK if math.isfinite(value) else Status.NOT_RESOLVED,
    )


def over_data(
    estimate: Estimate, stderr: float | None, risk: EmpiricalRisk
) -> Estimate:
    r"""Return the estimate with its error over batches counted in.

    An error over probes and one over data add in squares. The degrees of freedom are
    then those of their sum,

    .. math:: \nu = (s_1^2 + s_2^2)^2 / (s_1^4/\nu_1 + s_2^4/\nu_2).

    Args:
        estimate: The estimate with its own error, if it has one.
        stderr: The error over batches; ``None`` leaves the estimate as it is.
        risk: Has the batches.

    Source:
        Satterthwaite 1946, "An approximate distribution of estimates of variance
        components".
    """
    if stderr is None:
        return estimate
    shares = batch_shares(risk)
    assert shares is not None  # or there were no error
    num_batches = len(shares)
    own, freedom = estimate.stderr, num_batches - 1
    if own is None:
        return replace(
            estimate,
            stderr=stderr,
            error_source=ErrorSource.DATA,
            num_samples=num_batches,
            dof=freedom,
        )
    ratio = estimate.ratio
    if isinstance(ratio, LogRatio):
        ratio = replace(ratio, stderr=math.hypot(ratio.stderr, stderr / estimate.value))
    total = own**2 + stderr**2
    spread = stderr**4 / freedom + (own**4 / estimate.dof if estimate.dof else 0.0)
    return replace(
        estimate,
        stderr=math.sqrt(total),
        error_source=ErrorSource.DATA_AND_PROBES,
        num_samples=num_batches,
        dof=total**2 / spread if spread > 0 else freedom,
        ratio=ratio,
    )


def form(vector: Tensor, product: Tensor) -> Tensor:
    """Return the inner product of a vector and its product, in double precision."""
    return vector.double() @ product.double()


def has_groups(operator: RiskOperator) -> bool:
    """Whether there are two batches or more, kept together, to take an error over."""
    shares = batch_shares(operator.risk)
    return shares is not None and len(shares) > 1


def mean_weights(noted: list[Tensor]) -> Tensor:
    """Return the weights of a mean over all that was noted."""
    return torch.full((len(noted),), 1 / len(noted), dtype=torch.float64)


def product_parts(
    operator: RiskOperator, noted: list[Tensor], weights: Tensor
) -> Tensor:
    """Return the batches' parts of a weighted sum over products, ``(B, ...)``.

    Args:
        operator: Whose products.
        noted: What ``operator.noting`` gave: of each product, a row for each batch.
        weights: ``(products,)``.
    """
    table = torch.stack(noted)  # (products, B, ...)
    return gathered(torch.tensordot(weights.to(table), table, dims=1), operator.risk)


def product_stderr(
    operator: RiskOperator, noted: list[Tensor], weights: Tensor
) -> float | None:
    """Return the error over batches of a weighted sum over products."""
    parts = product_parts(operator, noted, weights)
    if not bool(parts.isfinite().all()):
        return None
    return data_stderr(parts, batch_shares(operator.risk))
