"""Keskar's epsilon-sharpness: the largest relative increase of the loss in a box."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import Count, Hint, Positive, PositiveInt
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import batch_parts, data_stderr_at
from noisekit.sharpness.measurement import (
    Detail,
    Measure,
    Measurement,
    MeasurementContext,
    MeasureResult,
)
from noisekit.sharpness.search.box_search import SearchMethod, search_box
from noisekit.sharpness.search.highest_point import (
    HighestPoint,
    first_order_share,
    status_and_note,
)
from noisekit.sharpness.search.regions import Box, keskar_box
from noisekit.sharpness.search.subspace import RandomSubspace

_LINE_SEARCH = 21
"""Most evaluations of one iteration of L-BFGS-B: SciPy's ``maxls``, and the point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpsilonSharpnessResult(MeasureResult):
    """Epsilon-sharpness at one point: a lower bound of the maximum [%].

    The settings are attributes as well.

    Attributes:
        loss: Loss at the point itself.
        column_scaling: Distribution of the columns' entries, ``None`` in full space.
        seed: Seed of the generator that made columns and random starts.
        first_order_share: Part of the increase that the gradient alone gives when the
            loss is taken as linear, at most 1; NaN where the loss did not increase.
        grad_norm: Norm of the gradient at the point [loss/param].
        displacement_norm: Euclidean length of the best displacement found [param].
        shortfall: How much more [%] was found by ``extra_iterations``, if asked for.
        check_value: Sharpness [%] found by L-BFGS-B, if ``check`` was asked for.
        detail: What a reader must know, such as that the point is no minimizer.
    """

    loss: float
    epsilon: float
    subspace_dim: int | None
    max_iter: int
    method: SearchMethod
    restarts: int
    extra_iterations: int
    check: bool
    column_scaling: str | None
    seed: int
    first_order_share: float
    grad_norm: float
    displacement_norm: float
    shortfall: float | None
    check_value: float | None
    detail: str

    @property
    def num_grads(self) -> int:
        """Gradient evaluations spent."""
        return self.estimate.num_grads

    def __str__(self) -> str:
        """Write the value with its error, the box, and what a reader must know."""
        return self.text(
            "%",
            f"box of {self.epsilon:g}",
            None if self.subspace_dim is None else f"{self.subspace_dim} dimensions",
            self.detail,
        )


@dataclass(frozen=True, kw_only=True)
class EpsilonSharpness(Measure):
    """Settings of :func:`epsilon_sharpness`."""

    name = "epsilon_sharpness"
    description = (
        "epsilon-sharpness, the largest relative increase of the loss in a box, "
        "searched from corner to corner (a lower bound)"
    )
    sources = ("keskar2017large",)
    in_variant = ("epsilon", "subspace_dim")

    epsilon: Annotated[Positive, Hint(advice="the paper uses 1e-3 and 5e-4")] = 1e-3
    subspace_dim: PositiveInt | None = None
    max_iter: Annotated[PositiveInt, Hint(advice="the paper uses 10")] = 10
    method: SearchMethod = "vertex"
    restarts: Count = 0
    extra_iterations: Count = 0
    check: bool = False

    def __post_init__(self) -> None:
        """Check the settings, and that a check compares with something else."""
        super().__post_init__()
        if self.check and self.method == "lbfgsb":
            raise UsageError(
                "check compares the vertex search with L-BFGS-B and needs "
                "method='vertex', got method='lbfgsb'; leave check out."
            )

    def cost(self) -> int:
        """Return a gradient per iteration of each search, and two losses."""
        searches = self.restarts + 1
        each = self.max_iter + self.extra_iterations + 1
        by_lbfgsb = searches * _LINE_SEARCH * each
        by_vertex = searches * each
        own = by_vertex if self.method == "vertex" else by_lbfgsb
        return 2 + own + (by_lbfgsb if self.check else 0)

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield epsilon-sharpness, and its first-order share."""
        stream = context.stream("epsilon", f"{self.epsilon:g}", str(self.subspace_dim))
        result = self.result(context.risk, stream)
        detail: Detail = {
            "epsilon": self.epsilon,
            "subspace_dim": self.subspace_dim,
            "column_scaling": result.column_scaling,
            "method": self.method,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "displacement_norm": result.displacement_norm,
            "first_order_share": result.first_order_share,
            "note": result.detail,
        }
        yield self.measured(
            result.estimate, detail=detail, data_stderr=result.data_stderr
        )
        share = Estimate(result.first_order_share, status=result.estimate.status)
        yield Measurement("first_order_share", share, self.variant)

    def result(
        self, risk: EmpiricalRisk, generator: torch.Generator
    ) -> EpsilonSharpnessResult:
        """Search the box of a risk, with what is needed to read the result.

        Raises:
            UsageError: If the loss is not above -1, or there are fewer parameters than
                random columns.
        """
        # Half precision cannot hold a change of one part in a thousand.
        risk = risk.in_precision(torch.float32)
        origin = risk.vector()
        box = self._box(origin, generator)
        with risk.evaluating():
            start = risk.value_and_grad()
            _check_loss(start[0])

            def highest(method: SearchMethod, extra_iterations: int) -> HighestPoint:
                return search_box(
                    risk,
                    box,
                    origin=origin,
                    start=start,
                    method=method,
                    max_iter=self.max_iter,
                    restarts=self.restarts,
                    extra_iterations=extra_iterations,
                    generator=generator,
                )

            result = highest(self.method, self.extra_iterations)
            checked = highest("lbfgsb", 0) if self.check else None
            error = _data_stderr(risk, start[0], result, origin, box)
        loss, grad = start
        percent = 100 / (1 + loss)
        share = first_order_share(
            box.linear_increase(box.gradient(grad)), result.increase
        )
        status, note = status_and_note(loss, result.increase, "box", share=share)
        num_grads = 1 + result.num_grads + (checked.num_grads if checked else 0)
        return EpsilonSharpnessResult(
            estimate=Estimate(
                percent * result.increase,
                side="lower",
                status=status,
                num_grads=num_grads,
            ),
            data_stderr=error,
            loss=loss,
            column_scaling=None if self.subspace_dim is None else "standard normal",
            seed=generator.initial_seed(),
            first_order_share=share,
            grad_norm=float(grad.double().norm()),
            displacement_norm=float(
                box.displacement(result.coordinates).double().norm()
            ),
            shortfall=percent * result.shortfall if self.extra_iterations else None,
            check_value=percent * checked.increase if checked else None,
            detail=note,
            **vars(self),
        )

    def _box(self, origin: Tensor, generator: torch.Generator) -> Box:
        if self.subspace_dim is None:
            return keskar_box(origin, self.epsilon)
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        return RandomSubspace(
            origin, self.epsilon, num_dims=self.subspace_dim, seed=int(seed)
        )


@checked
def epsilon_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    epsilon: float = EpsilonSharpness.epsilon,
    subspace_dim: int | None = EpsilonSharpness.subspace_dim,
    max_iter: int = EpsilonSharpness.max_iter,
    method: SearchMethod = EpsilonSharpness.method,
    restarts: int = EpsilonSharpness.restarts,
    extra_iterations: int = EpsilonSharpness.extra_iterations,
    check: bool = EpsilonSharpness.check,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> EpsilonSharpnessResult:
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

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> result = nk.epsilon_sharpness(model, loss_fn, batches, epsilon=1e-3)
        >>> round(result.value, 3)  # increase of the loss in the box [%]
        0.286
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = EpsilonSharpness(
        epsilon=epsilon,
        subspace_dim=subspace_dim,
        max_iter=max_iter,
        method=method,
        restarts=restarts,
        extra_iterations=extra_iterations,
        check=check,
    )
    return measure.result(risk, entropy_generator(generator))


def _data_stderr(
    risk: EmpiricalRisk,
    loss: float,
    highest_point: HighestPoint,
    origin: Tensor,
    box: Box,
) -> float | None:
    """Error of the sharpness over batches, as a ratio of two of their means."""
    if not math.isfinite(loss) or not math.isfinite(highest_point.increase):
        return None
    percent = 100 / (1 + loss)

    def parts(data: EmpiricalRisk) -> Tensor:
        before = batch_parts(data)
        after = batch_parts(data, origin + box.displacement(highest_point.coordinates))
        return percent * (after - before - highest_point.increase / (1 + loss) * before)

    return data_stderr_at(risk, parts)


def _check_loss(loss: float) -> None:
    if loss <= -1:
        raise UsageError(
            "epsilon-sharpness divides by 1 + loss and needs a loss above -1, got "
            f"{loss:.4g}; add a constant to the loss."
        )
