"""The highest loss that a search evaluated, and the status and note of the result."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.results import Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.search.regions import Region

_MINIMIZER_SHARE = 0.01
"""First-order share above which the point is called an iterate, not a minimizer."""


@dataclass(frozen=True, slots=True)
class HighestPoint:
    """The highest point that a search evaluated.

    Attributes:
        increase: Loss there minus the loss at the origin, at least 0; infinite where
            the loss was not finite, NaN where it is not at the origin.
        coordinates: The point, in the region's own coordinates.
        num_grads: Gradient evaluations spent.
        shortfall: Further increase found by the iterations beyond the budget.
    """

    increase: float
    coordinates: Tensor
    num_grads: int
    shortfall: float = 0.0


class LossNotFiniteError(Exception):
    """A search cannot continue from a point whose loss or gradient is not finite."""


class Search:
    """Evaluates points of a region, and stores the highest.

    Attributes:
        region: The feasible set.
        loss: Loss at the origin.
        gradient: Gradient there, in the region's coordinates.
        start: The origin, in the region's coordinates.
        within_budget: Whether evaluations count for the result, or only for the
            shortfall.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        region: Region,
        *,
        origin: Tensor,
        start: tuple[float, Tensor],
    ) -> None:
        """Start at the origin.

        Args:
            risk: The loss.
            region: The feasible set.
            origin: The weights in the middle of the region.
            start: Loss and gradient there.
        """
        self._risk, self.region, self._origin = risk, region, origin
        self.loss, grad = start
        self.gradient = region.gradient(grad)
        self.start = torch.zeros_like(self.gradient)
        self.within_budget = True
        self._best, self._increase, self._extended = self.start, 0.0, 0.0
        self._num_grads = 0

    def visit(
        self, point: Tensor, *, with_gradient: bool = True
    ) -> tuple[float, Tensor]:
        """Return loss and gradient at a point, and store it if it is the highest.

        Raises:
            LossNotFiniteError: If either is not finite.
        """
        weights = self._origin + self.region.displacement(point)
        if with_gradient:
            loss, grad = self._risk.value_and_grad(weights)
            self._num_grads += 1
        else:
            loss, grad = self._risk.value(weights), torch.zeros_like(self._origin)
        finite = math.isfinite(loss)
        increase = loss - self.loss if finite else math.inf
        self._extended = max(self._extended, increase)
        if increase > self._increase and self.within_budget:
            self._increase, self._best = increase, point.clone()
        if not finite or not bool(grad.isfinite().all()):
            raise LossNotFiniteError
        return loss, self.region.gradient(grad) if with_gradient else self.start

    def result(self) -> HighestPoint:
        """Return the highest point evaluated so far."""
        if not math.isfinite(self.loss):
            return HighestPoint(math.nan, self.start, 0)
        higher = self._extended > self._increase
        return HighestPoint(
            increase=self._increase,
            coordinates=self._best,
            num_grads=self._num_grads,
            shortfall=self._extended - self._increase if higher else 0.0,
        )


def first_order_share(linear: float, increase: float) -> float:
    """Return the part of an increase that a linear loss would give, at most 1.

    NaN where the loss did not increase.
    """
    return min(1.0, linear / increase) if increase > 0 else math.nan


def status_and_note(
    loss: float, increase: float, region: str, *, share: float = math.nan
) -> tuple[Status, str]:
    """Return whether an increase can be relied on, and what a reader must know.

    Args:
        loss: Loss at the point itself.
        increase: The largest one found around it.
        region: Where that was sought, such as ``"box"``.
        share: The first-order share; NaN where there is none.
    """
    if not math.isfinite(loss):
        return Status.DIVERGED, f"the loss at the point itself is {loss}"
    if not math.isfinite(increase):
        return Status.NOT_RESOLVED, f"the loss is not finite at a point of the {region}"
    if share > _MINIMIZER_SHARE:
        return Status.OK, (
            "iterate, not a minimizer: the gradient alone gives "
            f"{100 * share:.0f} % of the increase"
        )
    return Status.OK, ""
