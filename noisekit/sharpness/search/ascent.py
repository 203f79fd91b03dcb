"""Projected ascent to the highest loss in a ball around the weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.search.balls import Ball

_LONGEST_STEP = 64.0
"""Longest step, in radii; from there on a step all but forgets where it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AscentPlan:
    """How long to climb.

    Attributes:
        steps: Steps of each climb; 1 is SAM's own.
        restarts: Further climbs, each from a random point of the surface.
    """

    steps: int = 1
    restarts: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.steps < 1 or self.restarts < 0:
            raise UsageError(
                "an ascent needs at least 1 step and 0 restarts, got "
                f"steps={self.steps} and restarts={self.restarts}."
            )


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest point that an ascent visited.

    Attributes:
        rise: Loss there minus the loss at the origin, at least 0; infinite where the
            loss was not finite.
        coordinates: The point, in the ball's own coordinates.
        num_grads: Gradient evaluations spent.
    """

    rise: float
    coordinates: Tensor
    num_grads: int


def ascend(
    risk: EmpiricalRisk,
    ball: Ball,
    *,
    origin: Tensor,
    start: tuple[float, Tensor],
    plan: AscentPlan,
    generator: torch.Generator,
) -> Peak:
    """Climb from the middle of the ball, and again from random points.

    The first step goes as far as the ball does, so that one step is SAM's. A step
    that does not lead upwards is halved and taken again from the same point; one that
    does is doubled.

    Args:
        risk: The loss.
        ball: Where to climb.
        origin: The weights at the ball's middle.
        start: Loss and gradient there.
        plan: How long.
        generator: Source of random points.
    """
    loss, grad = start
    nowhere = torch.zeros_like(origin)
    if not math.isfinite(loss):
        return Peak(math.nan, nowhere, 0)
    climb = _Climb(risk, ball, origin, loss)
    climb.run(nowhere, loss, ball.gradient(grad), plan.steps, generator)
    for _ in range(plan.restarts):
        point = ball.random_point(generator)
        height, slope = climb.visit(point, with_slope=True)
        climb.run(point, height, slope, plan.steps, generator)
    return Peak(climb.rise, climb.best, climb.num_grads)


class _Climb:
    """Climbs in one ball and remembers the highest point of all climbs."""

    def __init__(
        self, risk: EmpiricalRisk, ball: Ball, origin: Tensor, loss: float
    ) -> None:
        self._risk, self._ball, self._origin, self._loss = risk, ball, origin, loss
        self.best = torch.zeros_like(origin)
        self.rise = 0.0
        self.num_grads = 0

    def run(
        self,
        point: Tensor,
        height: float,
        slope: Tensor,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        """Climb from a point of known height and slope."""
        reach = 2 * self._ball.rho
        for step in range(steps):
            if not math.isfinite(height) or not bool(slope.isfinite().all()):
                return
            direction = self._ball.direction(slope)
            if not bool(direction.any()):  # an exact minimiser points nowhere
                direction = self._ball.random_point(generator) / self._ball.rho
            trial = self._ball.project(point + reach * direction)
            last = step == steps - 1
            trial_height, trial_slope = self.visit(trial, with_slope=not last)
            if trial_height > height:
                point, height, slope = trial, trial_height, trial_slope
                reach = min(2 * reach, _LONGEST_STEP * self._ball.rho)
            else:
                reach /= 2

    def visit(self, point: Tensor, *, with_slope: bool) -> tuple[float, Tensor]:
        """Evaluate a point, and remember it if it is the highest."""
        weights = self._origin + self._ball.displacement(point)
        if with_slope:
            loss, grad = self._risk.value_and_grad(weights)
            slope = self._ball.gradient(grad)
            self.num_grads += 1
        else:
            loss, slope = self._risk.value(weights), point
        if not math.isfinite(loss):
            loss = math.inf
        if loss - self._loss > self.rise:
            self.rise, self.best = loss - self._loss, point
        return loss, slope
