"""The search for the highest loss in a box: corner to corner, or by L-BFGS-B."""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize
from torch import Tensor

from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.search.highest_point import (
    HighestPoint,
    LossNotFiniteError,
    Search,
)
from noisekit.sharpness.search.regions import Box

SearchMethod = Literal["vertex", "lbfgsb"]

_INNER_PART = 0.01
"""Size of the random start of L-BFGS-B, relative to the box."""

_SHORTEST_STEP = 0.1
"""Frank-Wolfe step size below which a vertex search restarts."""


def search_box(
    risk: EmpiricalRisk,
    box: Box,
    *,
    origin: Tensor,
    start: tuple[float, Tensor],
    method: SearchMethod,
    max_iter: int,
    restarts: int,
    extra_iterations: int,
    generator: torch.Generator,
) -> HighestPoint:
    """Search the box around ``origin`` for the highest loss.

    Args:
        risk: The loss.
        box: Where to search.
        origin: The weights in the middle of the box.
        start: Loss and gradient there.
        method: ``"vertex"`` or ``"lbfgsb"``.
        max_iter: Iterations of each search.
        restarts: Further searches, each from a random corner.
        extra_iterations: Iterations after ``max_iter``, which only give the shortfall.
        generator: Source of random starts.
    """
    search = Search(risk, box, origin=origin, start=start)
    if not math.isfinite(search.loss):
        return search.result()
    run = _jump_between_corners if method == "vertex" else _run_lbfgsb
    for restart in range(restarts + 1):
        corner = None if restart == 0 else box.random_point(generator)
        search.within_budget = True
        try:
            run(search, box, corner, (max_iter, extra_iterations), generator)
        except LossNotFiniteError:
            break  # No finite loss can exceed it.
    return search.result()


def _jump_between_corners(
    search: Search,
    box: Box,
    start: Tensor | None,
    iterations: tuple[int, int],
    generator: torch.Generator,
) -> None:
    """Frank-Wolfe: step towards the corner of the box that the gradient points to.

    A convex function is maximal at a corner, and full steps go from corner to corner.
    A step that does not increase the loss, as where it is concave, is halved. At a
    corner whose gradient points to itself (a stationary point), and after some
    halvings, the remaining iterations start from a random corner.
    """
    if start is None:
        point, loss, gradient = search.start, search.loss, search.gradient
    else:
        point = start
        loss, gradient = search.visit(start)
    max_iter, extra = iterations
    step = 1.0
    for i in range(max_iter + extra):
        search.within_budget = i < max_iter
        random = box.random_point(generator)
        # Entries of zero gradient, as at an exact minimizer, take a random sign.
        corner = torch.where(gradient == 0, random, box.support_point(gradient))
        stuck = step < _SHORTEST_STEP or torch.equal(corner, point)
        trial = random if stuck else torch.lerp(point, corner, step)
        trial_loss, trial_gradient = search.visit(trial)
        if stuck or trial_loss > loss:
            point, loss, gradient, step = trial, trial_loss, trial_gradient, 1.0
        else:
            step /= 2


def _run_lbfgsb(
    search: Search,
    box: Box,
    start: Tensor | None,
    iterations: tuple[int, int],
    generator: torch.Generator,
) -> None:
    """Run SciPy's L-BFGS-B on the negative loss, with all tolerances at zero.

    Near a minimizer default tolerances would stop it at once; for the same reason it
    starts beside the origin, where the gradient is not zero.
    """
    if start is None:
        start = _INNER_PART * box.random_inner_point(generator)
    like = box.radius
    max_iter, extra = iterations
    done = 0

    def negative(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        loss, gradient = search.visit(torch.from_numpy(point).to(like))
        return -loss, -gradient.double().cpu().numpy()

    def count(xk: NDArray[np.float64]) -> None:  # SciPy asks for this name
        nonlocal done
        done += 1
        search.within_budget = done < max_iter

    limit = like.double().cpu().numpy()
    minimize(
        negative,
        start.double().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(-limit, limit),
        callback=count,
        options={"maxiter": max_iter + extra, "ftol": 0.0, "gtol": 0.0},
    )
