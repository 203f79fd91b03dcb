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
"""In radii: the first reaches the boundary, the longest forgets where it began."""


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
    r"""Climb from the origin, and again from random points of the boundary.

    .. math:: z \leftarrow \Pi\big(z + s\, \arg\max_{z'} z'^\top A^\top g\big)

    The first step reaches the boundary, so that one step is SAM's. A step that does
    not lead upwards is halved and taken again from the same point; one that does is
    doubled.

    Args:
        risk: The loss.
        region: Where to climb.
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
        _climb(search, search.start, (search.loss, search.gradient), steps, generator)
        for _ in range(restarts):
            point = region.random_point(generator)
            _climb(search, point, search.visit(point), steps, generator)
    except LossNotFiniteError:
        pass  # Nothing is higher than that.
    return search.result()


def _climb(
    search: Search,
    point: Tensor,
    at_point: tuple[float, Tensor],
    steps: int,
    generator: torch.Generator,
) -> None:
    """Climb from a point of known loss and gradient."""
    loss, gradient = at_point
    region, step = search.region, _FIRST_STEP
    for i in range(steps):
        if not bool(gradient.isfinite().all()):
            return
        towards = region.support_point(gradient)
        if not bool(towards.any()):  # At an exact minimiser the gradient is zero.
            towards = region.random_point(generator)
        trial = region.project(point + step * towards)
        # The gradient at the last point would not be used.
        trial_loss, trial_gradient = search.visit(trial, with_gradient=i < steps - 1)
        if trial_loss > loss:
            point, loss, gradient = trial, trial_loss, trial_gradient
            step = min(2 * step, _LONGEST_STEP)
        else:
            step /= 2
