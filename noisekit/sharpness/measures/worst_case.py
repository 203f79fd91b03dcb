"""Worst-case sharpness: the largest rise of the loss in a ball around the weights."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.distributed import sum_over_ranks
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import (
    batch_parts,
    data_stderr_at,
    gathered,
    mean_over_batches,
)
from noisekit.sharpness.measures.logits import Logits, with_logits
from noisekit.sharpness.search.ascent import AscentPlan, Peak, ascend
from noisekit.sharpness.search.balls import Ball, BallNorm, ball, weight_units
from noisekit.sharpness.search.first_order import first_order_share, reading, remarks


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCaseSharpness:
    """Worst-case sharpness at one point, with what is needed to read it.

    Attributes:
        estimate: The largest rise that was visited [loss], a lower bound of the
            maximum; with ``batch_size`` its mean over the groups, with the error over
            them.
        data_stderr: Error over the batches to first order, the displacement taken as
            found; ``None`` with ``batch_size`` and where there is one batch.
        loss: Loss at the point itself, with logits as asked for.
        rho: Radius of the ball.
        norm: Its norm.
        adaptive: Whether weights move in units of ``|w| + eta``.
        eta: What is added to the unit of every weight.
        plan: How long was climbed.
        batch_size: Examples in a group (m-sharpness); ``None`` for all data at once.
        logits: How logits were normalised.
        seed: Seed of the generator of random points.
        first_order_share: Part of the rise that the gradient alone gives when the
            loss is taken as linear, at most 1; NaN where the loss did not rise.
        grad_norm: Norm of the gradient at the point [loss/param].
        displacement: ``(P,)``, the best found; ``None`` with ``batch_size``.
        num_at_rest: Weights that cannot move, since they are zero and ``eta`` too.
        detail: What a reader must know.
    """

    estimate: Estimate
    data_stderr: float | None
    loss: float
    rho: float
    norm: BallNorm
    adaptive: bool
    eta: float
    plan: AscentPlan
    batch_size: int | None
    logits: Logits
    seed: int
    first_order_share: float
    grad_norm: float
    displacement: Tensor | None = field(repr=False)
    num_at_rest: int
    detail: str

    @property
    def value(self) -> float:
        """Sharpness [loss]."""
        return self.estimate.value

    def __float__(self) -> float:
        """Return the bare value [loss]."""
        return self.estimate.value

    def __str__(self) -> str:
        """Write the value with its error, the ball, and what a reader must know."""
        unit = " in units of |w|" if self.adaptive else ""
        return remarks(
            f"{self.estimate} loss",
            None if self.data_stderr is None else f"± {self.data_stderr:.2g} over data",
            f"{self.norm} ball of {self.rho:g}{unit}",
            None if self.batch_size is None else f"groups of {self.batch_size}",
            self.detail,
        )


def worst_case_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    rho: float = 0.05,
    norm: BallNorm = "l2",
    adaptive: bool = False,
    eta: float = 0.0,
    steps: int = 1,
    restarts: int = 0,
    batch_size: int | None = None,
    logits: Logits = "raw",
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> WorstCaseSharpness:
    r"""Return how much the loss can rise within a radius of the weights, as found.

    .. math:: \max_{|T^{-1} \delta|_p \le \rho} F(w + \delta) - F(w), \qquad
              T = 1 \text{ or } |w| + \eta

    One step is SAM's: :math:`\delta = \rho\, T^2 g / |T g|_2`, or
    :math:`\rho\, T\, \mathrm{sign}(g)`. More steps are projected ascent. The best point
    visited counts, so that the value is never below zero and never above the maximum.
    At an exact minimiser, where the gradient points nowhere, a random direction does.

    Adaptive values with ``eta=0`` do not change under rescalings of layers or neurons
    that keep a ReLU network's function; with ``eta`` above 0 they do a little.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        rho: Radius; SAM uses 0.05, ASAM 0.5 with ``adaptive``.
        norm: ``"l2"``, or ``"linf"`` for the largest entry.
        adaptive: Whether a weight moves in proportion to its size. A weight of zero
            then stays at rest.
        eta: Added to the unit of every weight; ASAM uses 0.01.
        steps: Steps of the ascent.
        restarts: Further ascents, each from a random point of the surface.
        batch_size: Take the maximum over each group of so many examples and average
            (m-sharpness); groups are made within batches, in order, and the ragged
            ends count by what they hold.
        logits: ``"raw"``, or centred and of ``"unit_norm"`` or ``"unit_std"``, so that
            a network cannot look flat by large outputs.
        generator: Source of random points; by default a fresh one.

    Returns:
        The sharpness [loss] and what it was found with. A point of the ball where the
        loss is not finite makes it infinite, with ``Status.NOT_RESOLVED``; a loss that
        is not finite at the weights themselves makes it NaN, with ``Status.DIVERGED``.

    Raises:
        UsageError: If an argument is out of range.

    Source:
        Foret et al. 2021, arXiv:2010.01412, for the step and m-sharpness; Kwon et al.
        2021, arXiv:2102.11600, for ``eta``; Andriushchenko et al. 2023,
        arXiv:2302.07011, for adaptive balls and normalised logits.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    plan = AscentPlan(steps=steps, restarts=restarts)
    drawn = entropy_generator(generator)
    risk = risk.in_precision(torch.float32)
    origin = risk.vector()
    units = weight_units(origin, adaptive=adaptive, eta=eta)
    surroundings = ball(norm, units, rho)
    normalised = with_logits(risk, logits)
    if batch_size is None:
        found = _over_all(normalised, surroundings, origin, plan, drawn)
    else:
        found = _over_groups(
            normalised, surroundings, origin, plan, drawn, batch_size=batch_size
        )
    # The gradient of a group is no sign of the gradient of the whole.
    share = found.first_order_share if batch_size is None else math.nan
    _, detail = reading(found.loss, found.estimate.value, "ball", share=share)
    return WorstCaseSharpness(
        estimate=found.estimate,
        data_stderr=found.data_stderr,
        loss=found.loss,
        rho=rho,
        norm=norm,
        adaptive=adaptive,
        eta=eta,
        plan=plan,
        batch_size=batch_size,
        logits=logits,
        seed=drawn.initial_seed(),
        first_order_share=found.first_order_share,
        grad_norm=found.grad_norm,
        displacement=found.displacement,
        num_at_rest=int((units == 0).sum()),
        detail=detail,
    )


def groups_of(batches: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Yield the batches cut into groups of ``batch_size`` examples, in order.

    Raises:
        UsageError: If ``batch_size`` is not positive, or no batch has as many.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size needs to be at least 1, got {batch_size}.")
    largest = 0
    for batch in batches:
        largest = max(largest, count_examples(batch))
        for index in torch.split(torch.arange(count_examples(batch)), batch_size):
            yield take_examples(batch, index)
    if largest < batch_size:
        raise UsageError(
            f"groups of batch_size={batch_size} are made within batches and need one "
            f"of at least as many examples, got at most {largest}; pass larger "
            "batches, or a smaller batch_size (group_size= of MeasureSettings)."
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """What a search over all data, or over groups of them, came to."""

    estimate: Estimate
    loss: float
    first_order_share: float
    grad_norm: float
    data_stderr: float | None = None
    displacement: Tensor | None = None


def _over_all(
    risk: EmpiricalRisk,
    surroundings: Ball,
    origin: Tensor,
    plan: AscentPlan,
    generator: torch.Generator,
) -> _Found:
    """One search over all data, with the first-order error over batches."""
    with risk.evaluating():
        start = risk.value_and_grad()
        peak = ascend(
            risk,
            surroundings,
            origin=origin,
            start=start,
            plan=plan,
            generator=generator,
        )
        displacement = surroundings.displacement(peak.coordinates)
        error = data_stderr_at(
            risk,
            lambda data: batch_parts(data, origin + displacement) - batch_parts(data),
        )
    loss, grad = start
    return _Found(
        estimate=Estimate(
            peak.rise,
            side="lower",
            status=reading(loss, peak.rise, "ball")[0],
            num_grads=1 + peak.num_grads,
        ),
        loss=loss,
        first_order_share=first_order_share(
            surroundings.linear_rise(surroundings.gradient(grad)), peak.rise
        ),
        grad_norm=float(grad.double().norm()),
        data_stderr=error,
        displacement=displacement,
    )


def _over_groups(
    risk: EmpiricalRisk,
    surroundings: Ball,
    origin: Tensor,
    plan: AscentPlan,
    generator: torch.Generator,
    *,
    batch_size: int,
) -> _Found:
    """A search on each group of examples, averaged (m-sharpness)."""
    batches = (batch for _, batch in risk.weighted_batches())
    groups = risk.on(groups_of(batches, batch_size))
    rises, losses, linear, num_grads = [], [], [], 0
    grad_sum = torch.zeros_like(origin)
    counts = _wide([count for count in groups.normalisers if count > 0])
    with risk.evaluating():
        for count, (_, batch) in zip(counts, groups.weighted_batches(), strict=True):
            part = groups.on([batch])
            start = part.value_and_grad()
            peak: Peak = ascend(
                part,
                surroundings,
                origin=origin,
                start=start,
                plan=plan,
                generator=generator,
            )
            rises.append(peak.rise)
            losses.append(start[0])
            slope = surroundings.gradient(start[1])
            linear.append(surroundings.linear_rise(slope))
            grad_sum += count / risk.total * start[1]
            num_grads += 1 + peak.num_grads
    own = torch.stack([counts, _wide(rises), _wide(losses), _wide(linear)], 1)
    columns = gathered(own.to(origin.device), risk).unbind(1)
    shares = columns[0] / columns[0].sum()
    rise = mean_over_batches(shares * columns[1], shares)
    loss = float(shares @ columns[2])
    status, _ = reading(loss, rise.value, "ball")
    return _Found(
        estimate=replace(rise, side="lower", status=status, num_grads=num_grads),
        loss=loss,
        first_order_share=first_order_share(float(shares @ columns[3]), rise.value),
        grad_norm=float(sum_over_ranks(grad_sum, risk.ranks).double().norm()),
    )


def _wide(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
