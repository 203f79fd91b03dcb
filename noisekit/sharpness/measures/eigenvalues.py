"""Extreme eigenvalues of the Hessian: the sharpness that has no adjective."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import Positive, PositiveInt
from noisekit.curvature.eigenvalues.lanczos import top_eigenpairs
from noisekit.curvature.eigenvalues.pyhessian import pyhessian_top_eigenvalue
from noisekit.curvature.operators.preconditioned import ScaledOperator
from noisekit.sharpness.data_error import (
    curvature_parts,
    data_stderr_at,
)
from noisekit.sharpness.measurement import Measure, Measurement, MeasurementContext
from noisekit.sharpness.rescaling.chains import layers_before_norms
from noisekit.sharpness.rescaling.rescaling import Rescaling, rescaled_copy

EigenMethod = Literal["lanczos", "pyhessian"]

_TYPICAL_PRODUCTS = 15
"""Of an eigenvalue at tolerance 1e-3, for small trained networks."""

_LANCZOS_BUDGET, _PYHESSIAN_BUDGET = 120, 1000
"""Most products where no other number is given."""


@dataclass(frozen=True, kw_only=True)
class _Eigenvalue(Measure):
    """What the measures by Lanczos iteration have in common."""

    tol: Positive = 1e-3
    max_matvecs: PositiveInt | None = None

    @property
    def needs(self) -> str:
        """Second derivatives."""
        return "second derivatives"

    @property
    def sources(self) -> tuple[str, ...]:
        """The paper of Lanczos iteration with restarts."""
        return ("wu2000thick",)

    def cost(self) -> int:
        """Return the budget, and the forms by batch behind the error over data."""
        return 2 * (self.max_matvecs or _LANCZOS_BUDGET) + 3

    def typical_cost(self) -> int:
        """Return what it takes to converge, about."""
        return 2 * min(_TYPICAL_PRODUCTS, self.max_matvecs or _TYPICAL_PRODUCTS)


@dataclass(frozen=True, kw_only=True)
class LambdaMax(_Eigenvalue):
    """Settings of :func:`lambda_max`."""

    method: EigenMethod = "lanczos"

    @property
    def name(self) -> str:
        """``lambda_max``, or ``lambda_max_pyhessian``."""
        return "lambda_max" if self._by_lanczos else "lambda_max_pyhessian"

    @property
    def description(self) -> str:
        """How it is computed."""
        if self._by_lanczos:
            return (
                "the largest algebraic Hessian eigenvalue by Lanczos iteration with "
                "full reorthogonalization"
            )
        return "PyHessian's power iteration as a second opinion"

    @property
    def needs(self) -> str:
        """Second derivatives, or the package."""
        return super().needs if self._by_lanczos else "PyHessian installed"

    @property
    def sources(self) -> tuple[str, ...]:
        """The paper of the iteration."""
        return super().sources if self._by_lanczos else ("yao2020pyhessian",)

    @property
    def _by_lanczos(self) -> bool:
        return self.method == "lanczos"

    def cost(self) -> int:
        """Return the budget; PyHessian's is larger."""
        if self._by_lanczos:
            return super().cost()
        return 2 * (self.max_matvecs or _PYHESSIAN_BUDGET) + 2

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the largest eigenvalue."""
        if self._by_lanczos:
            result, error = context.eigenvalue(
                "LA", tol=self.tol, max_matvecs=self.max_matvecs
            )
            yield self.measured(result, data_stderr=error)
            return
        result = pyhessian_top_eigenvalue(
            context.risk,
            tol=self.tol,
            max_iterations=self.max_matvecs or _PYHESSIAN_BUDGET,
            generator=context.stream("pyhessian"),
        )
        yield self.measured(result)


@dataclass(frozen=True, kw_only=True)
class LambdaMin(_Eigenvalue):
    """Settings of :func:`lambda_min`."""

    name = "lambda_min"
    description = "the smallest algebraic Hessian eigenvalue by Lanczos iteration"

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the smallest eigenvalue."""
        result, error = context.eigenvalue(
            "SA", tol=self.tol, max_matvecs=self.max_matvecs
        )
        yield self.measured(result, data_stderr=error)


@dataclass(frozen=True, kw_only=True)
class GaugeFixedLambdaMax(_Eigenvalue):
    """Settings of :func:`gauge_fixed_lambda_max`."""

    name = "gauge_fixed_lambda_max"
    description = (
        "the largest Hessian eigenvalue with every weight row that feeds a BatchNorm "
        "at unit norm"
    )
    needs = "weights that feed a BatchNorm"
    sources = ("laarhoven2017l2",)

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the largest eigenvalue of ``D H D``, ``D`` the rows' norms."""
        risk = context.risk
        batch = next(iter(risk.batches))
        unit_rows = _unit_rows(risk, batch)
        rescaled_copy(risk.model, unit_rows, batch=batch, bn=risk.bn)
        lengths = 1 / unit_rows.vector(risk.layout)  # (P,): the norms, 1 elsewhere
        pairs = top_eigenpairs(
            ScaledOperator(context.hessian, lengths),
            tol=self.tol,
            max_matvecs=self.max_matvecs,
            generator=context.stream("gauge_fixed"),
        )
        result, error = pairs.estimate(), None
        if context.data_error and result.status is not Status.DIVERGED:
            # An eigenvector of D H D is, times D, the direction of that curvature in H.
            along = pairs.vectors[:, 0] * lengths.to(pairs.vectors)
            error = data_stderr_at(risk, lambda data: curvature_parts(data, along))
        if error is not None:
            result = replace(result, num_matvecs=result.num_matvecs + 1)
        yield self.measured(result, data_stderr=error)


@checked
def lambda_max(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    method: EigenMethod = LambdaMax.method,
    tol: float = LambdaMax.tol,
    max_matvecs: int | None = LambdaMax.max_matvecs,
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

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> round(float(nk.lambda_max(model, loss_fn, batches)), 4)
        4.0
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = LambdaMax(method=method, tol=tol, max_matvecs=max_matvecs)
    if method == "pyhessian" and data_error:
        raise UsageError(
            "data_error needs method='lanczos', got 'pyhessian', of which no "
            "eigenvector is kept."
        )
    return measure.estimate(risk, generator=generator, data_error=data_error)


@checked
def lambda_min(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    tol: float = LambdaMin.tol,
    max_matvecs: int | None = LambdaMin.max_matvecs,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    """Return the smallest (algebraic) eigenvalue of the Hessian of the loss.

    Clearly below zero the point is not a minimum. ``tol`` is relative to the norm of
    the Hessian, so that a value of that order cannot be distinguished from zero.

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

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> round(float(nk.lambda_min(model, loss_fn, batches)), 4)
        1.0
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = LambdaMin(tol=tol, max_matvecs=max_matvecs)
    return measure.estimate(risk, generator=generator, data_error=data_error)


@checked
def gauge_fixed_lambda_max(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    tol: float = GaugeFixedLambdaMax.tol,
    max_matvecs: int | None = GaugeFixedLambdaMax.max_matvecs,
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
    measure = GaugeFixedLambdaMax(tol=tol, max_matvecs=max_matvecs)
    return measure.estimate(risk, generator=generator, data_error=data_error)


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
