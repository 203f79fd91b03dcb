"""The search for the highest loss in a box: corner to corner, or by L-BFGS-B."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.search.boxes import Box

SearchMethod = Literal["vertex", "lbfgsb"]

_INTERIOR = 0.01
"""Size of the random start of L-BFGS-B, as a part of the box."""


_SHORTEST_STEP = 0.1
"""Part of a jump below which a vertex search starts anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """How long to search, and how.

    Attributes:
        method: ``"vertex"`` or ``"lbfgsb"``.
        max_iter: Iterations of each search.
        restarts: Further searches, each from a random corner.
        extra_iterations: Iterations after ``max_iter``, which are kept apart.
    """

    method: SearchMethod = "vertex"
    max_iter: int = 10
    restarts: int = 0
    extra_iterations: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.method not in {"vertex", "lbfgsb"}:
            raise UsageError(
                f"method needs to be 'vertex' or 'lbfgsb', got {self.method!r}."
            )
        if self.max_iter < 1:
            raise UsageError(
                f"max_iter needs at least 1 iteration, got {self.max_iter}; the "
                "paper uses 10."
            )
        if self.restarts < 0 or self.extra_iterations < 0:
            raise UsageError(
                "restarts and extra_iterations need to be 0 or more, got "
                f"{self.restarts} and {self.extra_iterations}."
            )


@dataclass(frozen=True, slots=True)
class Summit:
    """The highest point that a search visited.

    Attributes:
        rise: Loss there minus the loss at the origin, at least 0; infinite where the
            loss was not finite.
        coordinates: The point, in the box's own coordinates.
        shortfall: How much higher the extra iterations came.
        num_grads: Gradient evaluations spent.
    """

    rise: float
    coordinates: Tensor
    shortfall: float
    num_grads: int


def summit(
    risk: EmpiricalRisk,
    box: Box,
    *,
    origin: Tensor,
    start: tuple[float, Tensor],
    plan: SearchPlan,
    generator: torch.Generator,
) -> Summit:
    """Search the box around ``origin`` for the highest loss.

    Args:
        risk: The loss.
        box: Where to search.
        origin: The weights at the middle of the box.
        start: Loss and gradient at ``origin``.
        plan: How long to search, and how.
        generator: Source of random starts.
    """
    if not math.isfinite(start[0]):
        return Summit(math.nan, torch.zeros_like(box.radius), 0.0, 0)
    climb = _Climb(risk, box, origin, start)
    for restart in range(plan.restarts + 1):
        corner = None if restart == 0 else box.random_corner(generator)
        try:
            climb.run(corner, plan, generator)
        except _LossNotFiniteError:
            break  # Nothing is higher than that.
    higher = climb.extended_rise > climb.rise
    return Summit(
        rise=climb.rise,
        coordinates=climb.best,
        shortfall=climb.extended_rise - climb.rise if higher else 0.0,
        num_grads=climb.num_grads,
    )


class _LossNotFiniteError(Exception):
    """The search cannot go on from a point where the loss is not finite."""


class _Climb:
    """Climbs in one box and remembers the highest point of all climbs.

    ``rise`` and ``best`` are of the first ``max_iter`` iterations of every climb,
    ``extended_rise`` is of all iterations.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        box: Box,
        origin: Tensor,
        start: tuple[float, Tensor],
    ) -> None:
        self._risk, self._box, self._origin = risk, box, origin
        self._loss, grad = start
        self._grad = box.gradient(grad)
        self._iterations_left = 0
        self.best = torch.zeros_like(box.radius)
        self.rise = self.extended_rise = 0.0
        self.num_grads = 0

    def run(
        self, corner: Tensor | None, plan: SearchPlan, generator: torch.Generator
    ) -> None:
        """Climb once, from ``corner`` or from the origin."""
        self._iterations_left = plan.max_iter
        num_iterations = plan.max_iter + plan.extra_iterations
        if plan.method == "vertex":
            self._climb_vertices(corner, num_iterations, generator)
        else:
            self._climb_lbfgsb(corner, num_iterations, generator)

    def _visit(self, point: Tensor) -> tuple[float, Tensor]:
        """Evaluate the loss at a point of the box, and remember it if it is higher."""
        weights = self._origin + self._box.displacement(point)
        loss, grad = self._risk.value_and_grad(weights)
        self.num_grads += 1
        finite = math.isfinite(loss)
        rise = loss - self._loss if finite else math.inf
        self.extended_rise = max(self.extended_rise, rise)
        if rise > self.rise and self._iterations_left > 0:
            self.rise, self.best = rise, point.clone()
        if not finite or not bool(grad.isfinite().all()):
            raise _LossNotFiniteError
        return loss, self._box.gradient(grad)

    def _climb_vertices(
        self, start: Tensor | None, num_iterations: int, generator: torch.Generator
    ) -> None:
        """Jump to the corner that the gradient points to, again and again.

        This is Frank-Wolfe: a jump that does not lead upwards, as where the loss bends
        down, is cut in half. From a corner that points to itself, and after some cuts,
        the iterations that are left are spent from a random corner.
        """
        if start is None:
            point, loss, grad = (
                torch.zeros_like(self._box.radius),
                self._loss,
                self._grad,
            )
        else:
            point = start
            loss, grad = self._visit(start)
        step = 1.0
        for _ in range(num_iterations):
            random = self._box.random_corner(generator)
            # At an exact minimiser the gradient is zero and gives no direction.
            corner = torch.where(grad == 0, random, grad.sign() * self._box.radius)
            lost = step < _SHORTEST_STEP or torch.equal(corner, point)
            trial = random if lost else torch.lerp(point, corner, step)
            trial_loss, trial_grad = self._visit(trial)
            if lost or trial_loss > loss:
                point, loss, grad, step = trial, trial_loss, trial_grad, 1.0
            else:
                step /= 2
            self._iterations_left -= 1

    def _climb_lbfgsb(
        self, start: Tensor | None, num_iterations: int, generator: torch.Generator
    ) -> None:
        """Run SciPy's L-BFGS-B, with no tolerance that could stop it at the start.

        It starts beside the origin, where the gradient of a minimiser is not zero.
        """
        if start is None:
            start = _INTERIOR * self._box.random_point(generator)
        like = self._box.radius

        def descend(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            loss, grad = self._visit(torch.from_numpy(point).to(like))
            return -loss, -grad.double().cpu().numpy()

        def count(xk: NDArray[np.float64]) -> None:  # SciPy asks for this name
            self._iterations_left -= 1

        limit = like.double().cpu().numpy()
        minimize(
            descend,
            start.double().cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=Bounds(-limit, limit),
            callback=count,
            options={"maxiter": num_iterations, "ftol": 0.0, "gtol": 0.0},
        )
