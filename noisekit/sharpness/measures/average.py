"""Average-case sharpness: the mean rise of the loss under Gaussian noise on weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.random_vectors import entropy_generator, normal_vector
from noisekit.sharpness.data_error import batch_parts, batch_shares, data_stderr
from noisekit.sharpness.measures.logits import Logits, with_logits
from noisekit.sharpness.search.balls import weight_units
from noisekit.sharpness.search.first_order import remarks


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageSharpness:
    """Average-case sharpness at one point, with what is needed to read it.

    Attributes:
        estimate: Mean rise [loss], with its standard error over draws.
        data_stderr: Standard error over the batches, the draws taken as they were;
            ``None`` where there is one batch.
        loss: Loss at the point itself, with logits as asked for.
        sigma: Standard deviation of the noise, in units of each weight.
        adaptive: Whether that unit is ``|w| + eta``.
        eta: What is added to the unit of every weight.
        antithetic: Whether each draw was taken with its opposite.
        logits: How logits were normalised.
        seed: Seed of the generator of the noise.
        num_evaluations: Evaluations of the loss over all data.
    """

    estimate: Estimate
    data_stderr: float | None
    loss: float
    sigma: float
    adaptive: bool
    eta: float
    antithetic: bool
    logits: Logits
    seed: int
    num_evaluations: int

    @property
    def value(self) -> float:
        """Sharpness [loss]."""
        return self.estimate.value

    def __str__(self) -> str:
        """Write the value with both errors, and the noise."""
        unit = " in units of |w|" if self.adaptive else ""
        return remarks(
            f"{self.estimate} loss",
            None if self.data_stderr is None else f"± {self.data_stderr:.2g} over data",
            f"noise of {self.sigma:g}{unit}",
        )

    def __float__(self) -> float:
        """Return the bare value [loss]."""
        return self.estimate.value


def average_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    sigma: float = 0.01,
    adaptive: bool = False,
    eta: float = 0.0,
    num_draws: int = 16,
    antithetic: bool = True,
    logits: Logits = "raw",
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> AverageSharpness:
    r"""Return the mean rise of the loss when Gaussian noise is put on the weights.

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
        The mean rise [loss], which may be negative, with its error over draws and over
        the batches. A loss that is not finite at some draw makes it infinite, with
        ``Status.NOT_RESOLVED``; one that is not at the weights themselves makes it
        NaN, with ``Status.DIVERGED``.

    Raises:
        UsageError: If an argument is out of range.

    Source:
        Andriushchenko et al. 2023, arXiv:2302.07011, for the adaptive form.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    _refuse_bad_arguments(sigma, num_draws)
    drawn = entropy_generator(generator)
    risk = risk.in_precision(torch.float32)
    origin = risk.vector()
    scale = sigma * weight_units(origin, adaptive=adaptive, eta=eta)
    normalised = with_logits(risk, logits)
    with normalised.evaluating():
        base = batch_parts(normalised)
        rises = torch.stack(
            [
                _rise(normalised, origin, scale, antithetic, drawn) - base
                for _ in range(num_draws)
            ]
        )  # (draws, batches)
        shares = batch_shares(normalised)
    loss = float(base.sum())
    finite = bool(rises.isfinite().all())
    return AverageSharpness(
        estimate=_over_draws(loss, rises.sum(1)),
        data_stderr=data_stderr(rises.mean(0), shares) if finite else None,
        loss=loss,
        sigma=sigma,
        adaptive=adaptive,
        eta=eta,
        antithetic=antithetic,
        logits=logits,
        seed=drawn.initial_seed(),
        num_evaluations=1 + num_draws * (2 if antithetic else 1),
    )


def _rise(
    risk: EmpiricalRisk,
    origin: Tensor,
    scale: Tensor,
    antithetic: bool,
    generator: torch.Generator,
) -> Tensor:
    """The batches' parts of the loss under one draw, or the mean with its opposite."""
    like = (origin.dtype, origin.device)
    noise = scale * normal_vector(len(origin), generator, like)
    parts = batch_parts(risk, origin + noise)
    return (parts + batch_parts(risk, origin - noise)) / 2 if antithetic else parts


def _over_draws(loss: float, rises: Tensor) -> Estimate:
    if not math.isfinite(loss):
        return Estimate(math.nan, status=Status.DIVERGED)
    if not bool(rises.isfinite().all()):
        return Estimate(math.inf, status=Status.NOT_RESOLVED)
    num_draws = len(rises)
    return Estimate(
        float(rises.mean()),
        stderr=float(rises.std()) / math.sqrt(num_draws),
        error_source=ErrorSource.PROBES,
        num_samples=num_draws,
        dof=num_draws - 1,
    )


def _refuse_bad_arguments(sigma: float, num_draws: int) -> None:
    if not 0 < sigma < math.inf:
        raise UsageError(
            f"sigma needs to be a positive and finite standard deviation, got {sigma}."
        )
    if num_draws < 2:
        raise UsageError(
            f"num_draws needs to be at least 2 for an error estimate, got {num_draws}."
        )
