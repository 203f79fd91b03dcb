"""The norm of the gradient, and how much of it is noise of the data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noisekit.core.params import flatten
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.data_error import batch_shares, data_stderr, gathered
from noisekit.sharpness.measurement import (
    Detail,
    Measure,
    Measurement,
    MeasurementContext,
)

_MOSTLY_NOISE = 0.5
"""Share of noise in a squared gradient above which the card has a note."""


@dataclass(frozen=True, kw_only=True)
class GradNorm(Measure):
    """The norm of the gradient of the mean loss; it has no settings."""

    name = "grad_norm"
    description = "the norm of the gradient of the mean loss"

    def cost(self) -> int:
        """Return the gradient, and those of the batches."""
        return 2

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the norm, and how much of it is noise of the data."""
        _, gradient = context.loss_and_gradient()
        norm = float(torch.linalg.vector_norm(gradient.cpu().double()))
        status = Status.OK if math.isfinite(norm) else Status.DIVERGED
        estimate = Estimate(norm, status=status, num_grads=1)
        if not context.data_error or not 0 < norm < math.inf:
            yield self.measured(estimate)
            return
        error, share = gradient_errors(context.risk, gradient)
        detail: Detail = {"noise_share": share}
        if share is not None and share > _MOSTLY_NOISE:
            detail["note"] = (
                f"noise over the batches alone gives {100 * min(1.0, share):.0f} % of "
                "the square"
            )
        if error is not None:
            estimate = replace(estimate, num_grads=2)
        yield self.measured(estimate, detail=detail, data_stderr=error)


def gradient_errors(
    risk: EmpiricalRisk, gradient: Tensor
) -> tuple[float | None, float | None]:
    r"""Return the error of ``|g|`` over batches, and the share of noise in ``|g|²``.

    The error is that of the mean of :math:`g_b^\top g / |g|`. The square of a mean is
    too large by its variance: the share is that excess, and near one the gradient is
    not resolved from its noise.

    Args:
        risk: Has the batches; each costs one gradient.
        gradient: Of the whole, ``g``; not zero.
    """
    shares = batch_shares(risk)
    if shares is None or len(shares) < 2:
        return None, None
    risk = risk.in_precision(torch.float32)
    whole = gradient.double()
    norm = whole.norm()
    rows = []
    counted = [count for count in risk.normalisers if count > 0]
    with risk.evaluating():
        for count, (weight, loss) in zip(counted, risk.batch_losses(), strict=True):
            own = flatten(risk.gradients(weight * loss)).double()
            gap = own - count / risk.total * whole
            rows.append(torch.stack([own @ whole / norm, gap.square().sum()]))
    along, squares = gathered(torch.stack(rows), risk).unbind(1)
    factor = len(along) / (len(along) - 1)
    return data_stderr(along, shares), factor * float(squares.sum() / norm.cpu() ** 2)
