"""Keskar's epsilon-sharpness: the largest relative rise of the loss in a small box."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import batch_parts, data_stderr_at
from noisekit.sharpness.search.boxes import Box, FullSpace, RandomSubspace
from noisekit.sharpness.search.first_order import first_order_share, reading, remarks
from noisekit.sharpness.search.vertices import SearchMethod, SearchPlan, Summit, summit


@dataclass(frozen=True, slots=True, kw_only=True)
class EpsilonSharpness:
    """Epsilon-sharpness at one point, with what is needed to read it.

    Attributes:
        estimate: Sharpness [%]: the largest rise that the search visited, so a lower
            bound of the maximum.
        data_stderr: Error over the batches to first order [%], the displacement taken
            as found; ``None`` where there is one batch.
        loss: Loss at the point itself.
        epsilon: Size of the box.
        plan: How the box was searched.
        subspace_dim: Number of random columns, ``None`` in full space.
        column_scaling: Distribution of the columns' entries, ``None`` in full space.
        seed: Seed of the generator that made columns and random starts.
        first_order_share: Part of the rise that the gradient alone gives when the
            loss is taken as linear, at most 1; NaN where the loss did not rise.
        grad_norm: Norm of the gradient at the point [loss/param].
        displacement_norm: Euclidean length of the best displacement found [param].
        shortfall: How much more [%] was found by ``extra_iterations``, if asked for.
        check_value: Sharpness [%] found by L-BFGS-B, if ``check`` was asked for.
        detail: What a reader must know, such as that the point is no minimiser.
    """

    estimate: Estimate
    data_stderr: float | None
    loss: float
    epsilon: float
    plan: SearchPlan
    subspace_dim: int | None
    column_scaling: str | None
    seed: int
    first_order_share: float
    grad_norm: float
    displacement_norm: float
    shortfall: float | None
    check_value: float | None
    detail: str

    @property
    def value(self) -> float:
        """Sharpness [%]."""
        return self.estimate.value

    @property
    def method(self) -> SearchMethod:
        """How the box was searched."""
        return self.plan.method

    @property
    def num_grads(self) -> int:
        """Gradient evaluations spent."""
        return self.estimate.num_grads

    def __str__(self) -> str:
        """Write the value with its error, the box, and what a reader must know."""
        return remarks(
            f"{self.estimate} %",
            None if self.data_stderr is None else f"± {self.data_stderr:.2g} over data",
            f"box of {self.epsilon:g}",
            None if self.subspace_dim is None else f"{self.subspace_dim} dimensions",
            self.detail,
        )

    def __float__(self) -> float:
        """Return the bare value [%]."""
        return self.estimate.value


def epsilon_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    epsilon: float = 1e-3,
    subspace_dim: int | None = None,
    max_iter: int = 10,
    method: SearchMethod = "vertex",
    restarts: int = 0,
    extra_iterations: int = 0,
    check: bool = False,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> EpsilonSharpness:
    r"""Return Keskar's epsilon-sharpness of a model on the batches given.

    With weights ``x``, loss ``f`` and a matrix ``A`` (identity or random columns),

    .. math:: \phi = 100\,\frac{\max_{y \in C} f(x + A y) - f(x)}{1 + f(x)}, \quad
              C = \{y : |y_i| \le \epsilon (|(A^+ x)_i| + 1)\}.

    The maximum is searched for, never proven: the value is a lower bound. It changes
    under rescalings that keep a ReLU network's function, and where the gradient at
    ``x`` is not zero a part of it is no curvature at all: see ``first_order_share``.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        epsilon: Size of the box; the paper uses 1e-3 and 5e-4.
        subspace_dim: Number of random standard-normal columns (the paper's 100);
            ``None`` searches the full space.
        max_iter: Iterations; the paper uses 10.
        method: ``"vertex"`` jumps from corner to corner of the box along the sign of
            the gradient, one gradient evaluation per iteration. ``"lbfgsb"`` is the
            paper's L-BFGS-B, which in full space is slower and comes less high.
        restarts: Further searches, each from a random corner.
        extra_iterations: Go on for so many iterations per search, only to report how
            much ``max_iter`` iterations fell short.
        check: Search by L-BFGS-B as well and report what it found.
        generator: Source of the columns and of random starts; by default a fresh one,
            whose seed the result has.

    Returns:
        The sharpness [%] and what it was found with. A point of the box where the loss
        is not finite makes it infinite, with ``Status.NOT_RESOLVED``; a loss that is
        not finite at ``x`` itself makes it NaN, with ``Status.DIVERGED``.

    Raises:
        UsageError: If an argument is out of range, or the loss is not above -1.

    Source:
        Keskar et al. 2017, arXiv:1609.04836, metric 2.1 and section 2.2.2.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    plan = SearchPlan(
        method=method,
        max_iter=max_iter,
        restarts=restarts,
        extra_iterations=extra_iterations,
    )
    _refuse_bad_arguments(epsilon, method, check)
    generator = entropy_generator(generator)
    # Half precision cannot hold a change of one part in a thousand.
    risk = risk.in_precision(torch.float32)
    origin = risk.vector()
    box = _box(origin, epsilon, subspace_dim, generator)
    with risk.evaluating():
        start = risk.value_and_grad()
        _refuse_low_loss(start[0])
        search = partial(
            summit, risk, box, origin=origin, start=start, generator=generator
        )
        found = search(plan=plan)
        other = replace(plan, method="lbfgsb", extra_iterations=0)
        checked = search(plan=other) if check else None
        error = _data_stderr(risk, start[0], found, origin, box)
    return _result(
        box,
        start,
        found,
        checked,
        error=error,
        epsilon=epsilon,
        plan=plan,
        subspace_dim=subspace_dim,
        seed=generator.initial_seed(),
    )


def _result(
    box: Box,
    start: tuple[float, Tensor],
    found: Summit,
    checked: Summit | None,
    *,
    error: float | None,
    epsilon: float,
    plan: SearchPlan,
    subspace_dim: int | None,
    seed: int,
) -> EpsilonSharpness:
    """Put together what the search found with what the gradient alone gives."""
    loss, grad = start
    percent = 100 / (1 + loss)
    linear = (box.gradient(grad).double().abs() * box.radius.double()).sum()
    share = first_order_share(float(linear), found.rise)
    status, detail = reading(loss, found.rise, "box", share=share)
    return EpsilonSharpness(
        estimate=Estimate(
            percent * found.rise,
            side="lower",
            status=status,
            num_grads=1 + found.num_grads + (checked.num_grads if checked else 0),
        ),
        data_stderr=error,
        loss=loss,
        epsilon=epsilon,
        plan=plan,
        subspace_dim=subspace_dim,
        column_scaling=None if subspace_dim is None else "standard normal",
        seed=seed,
        first_order_share=share,
        grad_norm=float(grad.double().norm()),
        displacement_norm=float(box.displacement(found.coordinates).double().norm()),
        shortfall=percent * found.shortfall if plan.extra_iterations else None,
        check_value=percent * checked.rise if checked else None,
        detail=detail,
    )


def _data_stderr(
    risk: EmpiricalRisk, loss: float, found: Summit, origin: Tensor, box: Box
) -> float | None:
    """Error of the sharpness over batches, as a ratio of two of their means."""
    if not math.isfinite(loss) or not math.isfinite(found.rise):
        return None
    percent = 100 / (1 + loss)

    def parts(data: EmpiricalRisk) -> Tensor:
        before = batch_parts(data)
        after = batch_parts(data, origin + box.displacement(found.coordinates))
        return percent * (after - before - found.rise / (1 + loss) * before)

    return data_stderr_at(risk, parts)


def _box(
    origin: Tensor,
    epsilon: float,
    subspace_dim: int | None,
    generator: torch.Generator,
) -> Box:
    if subspace_dim is None:
        return FullSpace(origin, epsilon)
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return RandomSubspace(origin, epsilon, num_dims=subspace_dim, seed=int(seed))


def _refuse_bad_arguments(epsilon: float, method: SearchMethod, check: bool) -> None:
    if not 0 < epsilon < math.inf:
        raise UsageError(
            f"epsilon needs to be positive and finite, got {epsilon}; the paper uses "
            "1e-3 and 5e-4."
        )
    if check and method == "lbfgsb":
        raise UsageError(
            "check compares the vertex search with L-BFGS-B and needs "
            "method='vertex', got method='lbfgsb'; leave check out."
        )


def _refuse_low_loss(loss: float) -> None:
    if loss <= -1:
        raise UsageError(
            "epsilon-sharpness divides by 1 + loss and needs a loss above -1, got "
            f"{loss:.4g}; add a constant to the loss."
        )
