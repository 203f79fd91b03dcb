"""Traces of the Hessian, plain and in units of the weights."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import NumSamples
from noisekit.curvature.traces import trace, weighted_trace
from noisekit.sharpness.data_error import form, mean_weights, product_stderr
from noisekit.sharpness.measurement import Measure, Measurement, MeasurementContext


@dataclass(frozen=True, kw_only=True)
class HessianTrace(Measure):
    """Settings of :func:`hessian_trace`."""

    name = "hessian_trace"
    description = "the Hessian trace by Hutch++ with random signs"
    needs = "second derivatives"
    sources = ("hutchinson1989stochastic", "meyer2021hutch")

    num_matvecs: NumSamples = 32

    def cost(self) -> int:
        """Return the cost of the products."""
        return 2 * self.num_matvecs

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the trace; its error over batches takes no more products.

        The trace is linear in the matrix once directions and probes are drawn, so that
        each batch has its part of it.
        """
        hessian = context.hessian
        with hessian.noting(form) as noted:
            result = trace(
                hessian,
                num_matvecs=self.num_matvecs,
                generator=context.stream("trace"),
            )
        num_probes = result.num_samples or 0
        weights = torch.ones(len(noted), dtype=torch.float64)
        # Of Hutch++'s products a third only finds the dominant directions, a third is
        # the exact trace on these, and the rest is a mean over probes.
        weights[: self.num_matvecs // 3] = 0.0
        weights[len(noted) - num_probes :] = 1 / num_probes
        yield self.measured(result, data_stderr=product_stderr(hessian, noted, weights))


@dataclass(frozen=True, kw_only=True)
class WeightedHessianTrace(Measure):
    """Settings of :func:`weighted_hessian_trace`."""

    name = "weighted_hessian_trace"
    description = "the sum of squared weight times diagonal curvature by random signs"
    needs = "second derivatives"
    sources = ("hutchinson1989stochastic",)

    num_matvecs: NumSamples = 32

    def cost(self) -> int:
        """Return the cost of the products."""
        return 2 * self.num_matvecs

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the trace in units of the weights."""
        hessian = context.hessian
        with hessian.noting(form) as noted:
            result = weighted_trace(
                hessian,
                context.risk.vector(),
                num_matvecs=self.num_matvecs,
                generator=context.stream("weighted_trace"),
            )
        weights = mean_weights(noted)
        yield self.measured(result, data_stderr=product_stderr(hessian, noted, weights))


@checked
def hessian_trace(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    num_matvecs: int = HessianTrace.num_matvecs,
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
        data_error: Include the sampling error of the data, estimated from the per-batch
            contributions at no extra cost.

    Returns:
        The trace [loss/param²], with its standard error over probes, and
        over data where asked for.

    Raises:
        UsageError: If fewer than 2 products are given.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> round(float(nk.hessian_trace(model, loss_fn, batches)), 3)
        5.0
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = HessianTrace(num_matvecs=num_matvecs)
    return measure.estimate(risk, generator=generator, data_error=data_error)


@checked
def weighted_hessian_trace(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    num_matvecs: int = WeightedHessianTrace.num_matvecs,
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
        data_error: Include the sampling error of the data, estimated from the per-batch
            contributions at no extra cost.

    Returns:
        The sum [loss], with its standard error over probes, and
        over data where asked for.

    Raises:
        UsageError: If fewer than 2 products are given.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> round(float(nk.weighted_hessian_trace(model, loss_fn, batches)), 3)
        45.0
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = WeightedHessianTrace(num_matvecs=num_matvecs)
    return measure.estimate(risk, generator=generator, data_error=data_error)
