"""Worst-case sharpness: the largest increase of the loss around the weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.distributed import sum_over_ranks
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import Count, Hint, Positive, PositiveInt
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import (
    batch_parts,
    data_stderr_at,
    gathered,
    mean_over_batches,
)
from noisekit.sharpness.measurement import (
    Detail,
    Measurement,
    MeasurementContext,
    MeasureResult,
)
from noisekit.sharpness.measures.perturbation import (
    Logits,
    Perturbation,
    with_logits,
)
from noisekit.sharpness.search.ascent import ascend
from noisekit.sharpness.search.highest_point import (
    HighestPoint,
    first_order_share,
    status_and_note,
)
from noisekit.sharpness.search.regions import (
    BallNorm,
    Region,
    ball,
    weight_units,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCaseResult(MeasureResult):
    """Worst-case sharpness at one point: a lower bound of the maximum [loss].

    With ``batch_size`` it is the mean over groups, with its error over them. The
    settings are attributes as well.

    Attributes:
        loss: Loss at the point itself, with logits normalised as stated.
        seed: Seed of the generator of random points.
        first_order_share: Part of the increase that the gradient alone gives when the
            loss is taken as linear, at most 1; NaN where the loss did not increase.
        grad_norm: Norm of the gradient at the point [loss/param].
        displacement: ``(P,)``, the best found; ``None`` with ``batch_size``.
        num_fixed: Number of zero weights, which an adaptive ball with ``eta=0`` cannot
            perturb.
        detail: What a reader must know.
    """

    loss: float
    rho: float
    norm: BallNorm
    adaptive: bool
    eta: float
    steps: int
    restarts: int
    batch_size: int | None
    logits: Logits
    seed: int
    first_order_share: float
    grad_norm: float
    displacement: Tensor | None = field(repr=False)
    num_fixed: int
    detail: str

    def __str__(self) -> str:
        """Write the value with its error, the ball, and what a reader must know."""
        unit = " in units of |w|" if self.adaptive else ""
        return self.text(
            "loss",
            f"{self.norm} ball of {self.rho:g}{unit}",
            None if self.batch_size is None else f"groups of {self.batch_size}",
            self.detail,
        )


_DEFINITIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "worst_case_sharpness": (
        "worst-case sharpness in a ball by normalised gradient steps (lower bounds)",
        ("foret2021sharpness",),
    ),
    "adaptive_worst_case_sharpness": (
        "worst-case sharpness in a ball whose axes are proportional to the weights "
        "(lower bounds)",
        ("kwon2021asam", "andriushchenko2023modern"),
    ),
    "logit_normalised_worst_case_sharpness": (
        "worst-case sharpness of the loss of centred and normalised logits",
        ("andriushchenko2023modern",),
    ),
    "m_sharpness": (
        "worst-case sharpness averaged over groups of examples",
        ("foret2021sharpness",),
    ),
}
"""By quantity, how it is computed, and the papers that define it."""


@dataclass(frozen=True, kw_only=True)
class WorstCase(Perturbation):
    """Settings of :func:`worst_case_sharpness`, which decide the quantity."""

    rho: Annotated[Positive, Hint(advice="SAM uses 0.05")] = 0.05
    norm: BallNorm = "l2"
    steps: PositiveInt = 1
    restarts: Count = 0
    batch_size: PositiveInt | None = None

    @property
    def name(self) -> str:
        """The quantity that the settings define."""
        if self.batch_size is not None:
            return "m_sharpness"
        if self.logits != "raw":
            return "logit_normalised_worst_case_sharpness"
        return f"{'adaptive_' if self.adaptive else ''}worst_case_sharpness"

    @property
    def description(self) -> str:
        """How it is computed."""
        return _DEFINITIONS[self.name][0]

    @property
    def sources(self) -> tuple[str, ...]:
        """The papers that define it."""
        return _DEFINITIONS[self.name][1]

    @property
    def variant(self) -> str:
        """Radius and steps, or the size of a group."""
        last = f"steps={self.steps}"
        if self.batch_size is not None:
            last = f"m={self.batch_size}"
        return self.stating_eta(f"rho={self.rho:g},{last}")

    def cost(self) -> int:
        """Return a gradient per step of each ascent, and the losses of the error."""
        return 2 + (self.restarts + 1) * (self.steps + 1)

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the largest increase of the loss that was found."""
        names = [self.name]
        if self.batch_size is None:
            names += [f"{self.rho:g}", str(self.steps)]
        result = self.result(context.risk, context.stream(*names))
        detail: Detail = {
            "rho": self.rho,
            "norm": self.norm,
            "adaptive": self.adaptive,
            "eta": self.eta,
            "steps": self.steps,
            "logits": self.logits,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "first_order_share": result.first_order_share,
            "num_fixed": result.num_fixed,
            "note": result.detail,
        }
        yield self.measured(
            result.estimate, detail=detail, data_stderr=result.data_stderr
        )

    def result(
        self, risk: EmpiricalRisk, generator: torch.Generator
    ) -> WorstCaseResult:
        """Search the ball of a risk, with what is needed to read the result."""
        risk = risk.in_precision(torch.float32)
        origin = risk.vector()
        units = weight_units(origin, adaptive=self.adaptive, eta=self.eta)
        region = ball(self.norm, units, self.rho)
        ascent = partial(
            ascend,
            region=region,
            origin=origin,
            steps=self.steps,
            restarts=self.restarts,
            generator=generator,
        )
        normalised = with_logits(risk, self.logits)
        if self.batch_size is None:
            result = _over_all(normalised, region, origin, ascent)
        else:
            result = _over_groups(normalised, region, origin, ascent, self.batch_size)
        # The gradient of a group is no estimate of the gradient of the whole.
        share = result.first_order_share if self.batch_size is None else math.nan
        _, note = status_and_note(
            result.loss, result.estimate.value, "ball", share=share
        )
        return WorstCaseResult(
            estimate=result.estimate,
            data_stderr=result.data_stderr,
            loss=result.loss,
            seed=generator.initial_seed(),
            first_order_share=result.first_order_share,
            grad_norm=result.grad_norm,
            displacement=result.displacement,
            num_fixed=int((units == 0).sum()),
            detail=note,
            **vars(self),
        )


@checked
def worst_case_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    rho: float = WorstCase.rho,
    norm: BallNorm = WorstCase.norm,
    adaptive: bool = WorstCase.adaptive,
    eta: float = WorstCase.eta,
    steps: int = WorstCase.steps,
    restarts: int = WorstCase.restarts,
    batch_size: int | None = WorstCase.batch_size,
    logits: Logits = WorstCase.logits,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> WorstCaseResult:
    r"""Return the largest increase of the loss found within a radius of the weights.

    .. math:: \max_{|T^{-1} \delta|_p \le \rho} F(w + \delta) - F(w), \qquad
              T = 1 \text{ or } |w| + \eta

    One step is SAM's: :math:`\delta = \rho\, T^2 g / |T g|_2`, or
    :math:`\rho\, T\, \mathrm{sign}(g)`. More steps are projected ascent. The best point
    visited counts, so that the value is never below zero and never above the maximum.
    At an exact minimizer, where the gradient points nowhere, a random direction does.

    Adaptive values with ``eta=0`` do not change under rescalings of layers or neurons
    that keep a ReLU network's function; with ``eta`` above 0 they do a little.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        rho: Radius; SAM uses 0.05, ASAM 0.5 with ``adaptive``.
        norm: ``"l2"``, or ``"linf"`` for the largest entry.
        adaptive: Whether a weight moves in proportion to its size. A weight of zero
            then stays fixed.
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

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> result = nk.worst_case_sharpness(model, loss_fn, batches, rho=0.1, steps=20)
        >>> round(result.value, 4)
        0.4315
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = WorstCase(
        rho=rho,
        norm=norm,
        adaptive=adaptive,
        eta=eta,
        steps=steps,
        restarts=restarts,
        batch_size=batch_size,
        logits=logits,
    )
    return measure.result(risk, entropy_generator(generator))


def groups_of(batches: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Yield the batches cut into groups of ``batch_size`` examples, in order.

    Raises:
        UsageError: If no batch has as many.
    """
    largest = 0
    for batch in batches:
        largest = max(largest, count_examples(batch))
        for index in torch.split(torch.arange(count_examples(batch)), batch_size):
            yield take_examples(batch, index)
    if largest < batch_size:
        raise UsageError(
            f"groups of batch_size={batch_size} are made within batches and need one "
            f"of at least as many examples, got at most {largest}; pass larger "
            "batches, or a smaller batch_size."
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """The result of an ascent over all data, or averaged over groups of them."""

    estimate: Estimate
    loss: float
    first_order_share: float
    grad_norm: float
    data_stderr: float | None = None
    displacement: Tensor | None = None


def _over_all(
    risk: EmpiricalRisk,
    region: Region,
    origin: Tensor,
    ascent: Callable[..., HighestPoint],
) -> _Found:
    """One ascent over all data, with the first-order error over batches.

    By the envelope theorem the maximum moves with the data, to first order, like the
    loss difference at the maximizer held fixed: its parts by batch give the error.
    """
    with risk.evaluating():
        loss, grad = start = risk.value_and_grad()
        highest = ascent(risk, start=start)
        displacement = region.displacement(highest.coordinates)
        error = data_stderr_at(
            risk,
            lambda data: batch_parts(data, origin + displacement) - batch_parts(data),
        )
    return _Found(
        estimate=Estimate(
            highest.increase,
            side="lower",
            status=status_and_note(loss, highest.increase, "ball")[0],
            num_grads=1 + highest.num_grads,
        ),
        loss=loss,
        first_order_share=first_order_share(
            region.linear_increase(region.gradient(grad)), highest.increase
        ),
        grad_norm=float(grad.double().norm()),
        data_stderr=error,
        displacement=displacement,
    )


def _over_groups(
    risk: EmpiricalRisk,
    region: Region,
    origin: Tensor,
    ascent: Callable[..., HighestPoint],
    batch_size: int,
) -> _Found:
    """An ascent on each group of examples, averaged (m-sharpness)."""
    batches = (batch for _, batch in risk.weighted_batches())
    groups = risk.on(groups_of(batches, batch_size))
    rows, num_grads = [], 0
    grad_sum = torch.zeros_like(origin)
    counts = [count for count in groups.normalisers if count > 0]
    with risk.evaluating():
        for count, (_, batch) in zip(counts, groups.weighted_batches(), strict=True):
            part = groups.on([batch])
            loss, grad = start = part.value_and_grad()
            highest = ascent(part, start=start)
            linear = region.linear_increase(region.gradient(grad))
            rows.append([count, highest.increase, loss, linear])
            # The whole's gradient is the mean of the groups', weighted by counts.
            grad_sum += count / risk.total * grad
            num_grads += 1 + highest.num_grads
    own = torch.tensor(rows, dtype=torch.float64, device=origin.device)
    weight, increases, losses, slopes = gathered(own, risk).unbind(1)  # (groups,) each
    shares = weight / weight.sum()
    increase = mean_over_batches(shares * increases, shares)
    loss = float(shares @ losses)
    status, _ = status_and_note(loss, increase.value, "ball")
    return _Found(
        estimate=replace(increase, side="lower", status=status, num_grads=num_grads),
        loss=loss,
        first_order_share=first_order_share(float(shares @ slopes), increase.value),
        grad_norm=float(sum_over_ranks(grad_sum, risk.ranks).double().norm()),
    )
