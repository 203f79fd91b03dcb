"""Projected gradient ascent to the highest loss in a region around the weights."""

import math

import torch
from torch import Tensor

from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.search.highest_point import (
    HighestPoint,
    LossNotFiniteError,
    Search,
)
from noisekit.sharpness.search.regions import Region

_FIRST_STEP, _LONGEST_STEP = 2.0, 64.0
"""Step sizes in radii: 2 reaches the boundary from any point of the region; at 64 the
projection forgets the previous point, and the step is one of Frank-Wolfe."""


def ascend(
    risk: EmpiricalRisk,
    region: Region,
    *,
    origin: Tensor,
    start: tuple[float, Tensor],
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> HighestPoint:
    r"""Projected gradient ascent from the origin, and from random boundary points.

    .. math:: z \leftarrow \Pi\big(z + s\, \arg\max_{z'} z'^\top A^\top g\big)

    The first step reaches the boundary, so that a single step is SAM's. The step size
    is halved after a step that does not increase the loss, which is discarded, and
    doubled after one that does.

    Args:
        risk: The loss.
        region: The feasible set.
        origin: The weights in the middle of the region.
        start: Loss and gradient there.
        steps: Steps of each ascent.
        restarts: Further ascents.
        generator: Source of random points.
    """
    search = Search(risk, region, origin=origin, start=start)
    if not math.isfinite(search.loss):
        return search.result()
    try:
        _ascend(search, search.start, (search.loss, search.gradient), steps, generator)
        for _ in range(restarts):
            point = region.random_point(generator)
            _ascend(search, point, search.visit(point), steps, generator)
    except LossNotFiniteError:
        pass  # No finite loss can exceed it.
    return search.result()


def _ascend(
    search: Search,
    point: Tensor,
    at_point: tuple[float, Tensor],
    steps: int,
    generator: torch.Generator,
) -> None:
    """One ascent from a point of known loss and gradient."""
    loss, gradient = at_point
    region, step = search.region, _FIRST_STEP
    for i in range(steps):
        if not bool(gradient.isfinite().all()):
            return
        # The direction is that of steepest ascent in the region's norm: rho g / |g| of
        # a ball, the signs of a box.
        direction = region.support_point(gradient)
        if not bool(direction.any()):  # A zero gradient, as at an exact minimizer.
            direction = region.random_point(generator)
        trial = region.project(point + step * direction)
        # The gradient at the last point is not needed: a forward pass suffices.
        trial_loss, trial_gradient = search.visit(trial, with_gradient=i < steps - 1)
        if trial_loss > loss:
            point, loss, gradient = trial, trial_loss, trial_gradient
            step = min(2 * step, _LONGEST_STEP)
        else:
            step /= 2
