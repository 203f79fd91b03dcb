"""Average-case sharpness: the mean increase of the loss under Gaussian weight noise."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import NumSamples, Positive
from noisekit.curvature.random_vectors import entropy_generator, normal_vector
from noisekit.sharpness.data_error import batch_parts, batch_shares, data_stderr
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
from noisekit.sharpness.search.regions import weight_units


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageCaseResult(MeasureResult):
    """Average-case sharpness at one point [loss], with its error over draws.

    The settings are attributes as well.

    Attributes:
        loss: Loss at the point itself, with logits normalised as stated.
        seed: Seed of the generator of the noise.
        num_evaluations: Evaluations of the loss over all data.
    """

    loss: float
    sigma: float
    adaptive: bool
    eta: float
    num_draws: int
    antithetic: bool
    logits: Logits
    seed: int
    num_evaluations: int

    def __str__(self) -> str:
        """Write the value with both errors, and the noise."""
        unit = " in units of |w|" if self.adaptive else ""
        return self.text(
            "loss",
            f"noise of {self.sigma:g}{unit}",
        )


_METHODS = {
    "average_sharpness": (
        "average-case sharpness, the mean increase of the loss under Gaussian weight "
        "noise"
    ),
    "adaptive_average_sharpness": (
        "average-case sharpness under Gaussian noise proportional to each weight"
    ),
    "logit_normalised_average_sharpness": (
        "average-case sharpness of the loss of centred and normalised logits"
    ),
}


@dataclass(frozen=True, kw_only=True)
class AverageCase(Perturbation):
    """Settings of :func:`average_sharpness`, which decide the quantity."""

    in_variant = ("sigma",)

    sigma: Positive = 0.01
    num_draws: NumSamples = 16
    antithetic: bool = True

    @property
    def name(self) -> str:
        """The quantity that the settings define."""
        if self.logits != "raw":
            return "logit_normalised_average_sharpness"
        return f"{'adaptive_' if self.adaptive else ''}average_sharpness"

    @property
    def description(self) -> str:
        """How it is computed."""
        return _METHODS[self.name] + (" in antithetic pairs" if self.antithetic else "")

    @property
    def sources(self) -> tuple[str, ...]:
        """The paper of the adaptive form."""
        plain = self.name == "average_sharpness"
        return () if plain else ("andriushchenko2023modern",)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the loss over all data."""
        return 1 + self.num_draws * (2 if self.antithetic else 1)

    def cost(self) -> int:
        """Return a third of a gradient for each evaluation of the loss."""
        return math.ceil(self.num_evaluations / 3)

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the mean increase of the loss."""
        result = self.result(context.risk, context.stream(self.name, f"{self.sigma:g}"))
        detail: Detail = {
            "sigma": self.sigma,
            "adaptive": self.adaptive,
            "eta": self.eta,
            "antithetic": self.antithetic,
            "logits": self.logits,
            "loss": result.loss,
            "num_evaluations": result.num_evaluations,
        }
        yield self.measured(
            result.estimate, detail=detail, data_stderr=result.data_stderr
        )

    def result(
        self, risk: EmpiricalRisk, generator: torch.Generator
    ) -> AverageCaseResult:
        """Draw the noise on a risk, with what is needed to read the result."""
        risk = risk.in_precision(torch.float32)
        origin = risk.vector()
        scale = self.sigma * weight_units(origin, adaptive=self.adaptive, eta=self.eta)
        like = (origin.dtype, origin.device)
        normalised = with_logits(risk, self.logits)

        def increase() -> Tensor:
            """The batches' parts of the increase under one draw, ``(batches,)``."""
            noise = scale * normal_vector(len(origin), generator, like)
            parts = batch_parts(normalised, origin + noise)
            if self.antithetic:  # what the gradient adds cancels
                parts = (parts + batch_parts(normalised, origin - noise)) / 2
            return parts - base

        with normalised.evaluating():
            base = batch_parts(normalised)
            increases = torch.stack([increase() for _ in range(self.num_draws)])
            shares = batch_shares(normalised)
        loss = float(base.sum())
        finite = bool(increases.isfinite().all())
        return AverageCaseResult(
            estimate=_over_draws(loss, increases.sum(1)),
            data_stderr=data_stderr(increases.mean(0), shares) if finite else None,
            loss=loss,
            seed=generator.initial_seed(),
            num_evaluations=self.num_evaluations,
            **vars(self),
        )


@checked
def average_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    sigma: float = AverageCase.sigma,
    adaptive: bool = AverageCase.adaptive,
    eta: float = AverageCase.eta,
    num_draws: int = AverageCase.num_draws,
    antithetic: bool = AverageCase.antithetic,
    logits: Logits = AverageCase.logits,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> AverageCaseResult:
    r"""Return the mean increase of the loss under Gaussian noise on the weights.

    .. math:: \mathbb{E}_{\delta \sim N(0, \sigma^2 T^2)} F(w + \delta) - F(w)
              \approx \tfrac{\sigma^2}{2} \sum_i T_i^2 H_{ii}, \qquad
              T = 1 \text{ or } |w| + \eta

    ``sigma`` is a standard deviation, not a variance. Adaptive values with ``eta=0``
    do not change under rescalings that keep a ReLU network's function.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        sigma: Standard deviation of the noise, in units of each weight.
        adaptive: Whether the noise is in proportion to each weight's size.
        eta: Added to the unit of every weight.
        num_draws: Independent draws of the noise.
        antithetic: Take each draw with its opposite as well, at twice the cost: what
            the gradient adds then cancels, also out of the error.
        logits: ``"raw"``, or centred and of ``"unit_norm"`` or ``"unit_std"``.
        generator: Source of the noise; by default a fresh one.

    Returns:
        The mean increase [loss], which may be negative, with its error over draws and
        over the batches. A loss that is not finite at some draw makes it infinite, with
        ``Status.NOT_RESOLVED``; one that is not at the weights themselves makes it
        NaN, with ``Status.DIVERGED``.

    Raises:
        UsageError: If an argument is out of range.

    Source:
        Andriushchenko et al. 2023, arXiv:2302.07011, for the adaptive form.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> generator = torch.Generator().manual_seed(0)
        >>> result = nk.average_sharpness(
        ...     model, loss_fn, batches, sigma=0.1, num_draws=500, generator=generator
        ... )
        >>> print(result.estimate)  # sigma² tr H / 2 = 0.025
        0.02488 ± 0.0013
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = AverageCase(
        sigma=sigma,
        adaptive=adaptive,
        eta=eta,
        num_draws=num_draws,
        antithetic=antithetic,
        logits=logits,
    )
    return measure.result(risk, entropy_generator(generator))


def _over_draws(loss: float, increases: Tensor) -> Estimate:
    if not math.isfinite(loss):
        return Estimate(math.nan, status=Status.DIVERGED)
    if not bool(increases.isfinite().all()):
        return Estimate(math.inf, status=Status.NOT_RESOLVED)
    num_draws = len(increases)
    return Estimate(
        float(increases.mean()),
        stderr=float(increases.std()) / math.sqrt(num_draws),
        error_source=ErrorSource.PROBES,
        num_samples=num_draws,
        dof=num_draws - 1,
    )
