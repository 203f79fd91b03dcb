"""PAC-Bayes: the largest noise or displacement of weights that a network tolerates."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import ErrorSource, Estimate, LogRatio
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import (
    Count,
    Fraction,
    Hint,
    NumSamples,
    Positive,
    PositiveInt,
)
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import WithDataError, data_stderr
from noisekit.sharpness.jackknife import jackknife
from noisekit.sharpness.measurement import (
    Detail,
    Measure,
    Measurement,
    MeasurementContext,
    MeasureResult,
)
from noisekit.sharpness.measures.perturbation import NEEDS_CLASSES
from noisekit.sharpness.search.bracket import (
    Bracket,
    bracketed,
    crossing,
    error_factor,
    most_trials,
    times,
)
from noisekit.sharpness.search.criterion import Criterion, CriterionIncrease

_ERROR_TRIALS = 5
"""Sizes, or passes over the batches, that the errors take beside the bracket."""

_USUAL_TRIALS = 16
"""Sizes that are tried for small trained networks, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PacBayesResult(MeasureResult):
    """One over the squared size that a network tolerates; larger means sharper.

    In units of 1/param², or 1 where magnitude-aware.

    Attributes:
        radius: The largest size found that keeps the increase within the target.
        target: The increase that is allowed.
        criterion: Of what: the share of misclassified examples, or the loss.
        magnitude_aware: Whether sizes are in proportion to each weight.
        start: Error or loss at the weights themselves.
        seed: Seed of the generator of noise and random starts.
        num_evaluations: Evaluations of the criterion over all data.
        detail: Why there is no value, where there is none.
    """

    radius: float
    target: float
    criterion: Criterion
    magnitude_aware: bool
    start: float
    seed: int
    num_evaluations: int
    detail: str

    def __str__(self) -> str:
        """Write the value with both errors, the size, and why there is none."""
        within = f"keeps the {self.criterion} within {self.target:g} of its start"
        return self.text(
            "" if self.magnitude_aware else "1/param²",
            f"size {self.radius:.4g} {within}" if math.isfinite(self.value) else None,
            self.detail,
        )


@dataclass(frozen=True, kw_only=True)
class _Tolerated(Measure):
    """What both forms have in common: a largest size within a target, by bisection."""

    needs = NEEDS_CLASSES
    sources = ("jiang2020fantastic",)

    target: Annotated[Positive, Hint(advice="0.1 is usual")] = 0.1
    criterion: Criterion = "error"
    magnitude_aware: bool = False
    tol: Fraction = 0.01

    @property
    def variant(self) -> str:
        """Whether sizes are in proportion to each weight."""
        return "magnitude_aware" if self.magnitude_aware else ""

    @abstractmethod
    def result(self, risk: EmpiricalRisk, generator: torch.Generator) -> PacBayesResult:
        """Find the size for a risk, with what is needed to read the result."""

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield one over the squared size."""
        generator = context.stream(self.name, str(self.magnitude_aware))
        result = self.result(context.risk, generator)
        detail: Detail = {
            "radius": result.radius,
            "target": self.target,
            "criterion": self.criterion,
            "start": result.start,
            "num_evaluations": result.num_evaluations,
            "note": result.detail,
        }
        yield self.measured(
            result.estimate, detail=detail, data_stderr=result.data_stderr
        )

    def _result(
        self,
        bracket: Bracket,
        trial: CriterionIncrease,
        estimate: Estimate,
        stderr: float | None,
    ) -> PacBayesResult:
        return PacBayesResult(
            estimate=replace(estimate, num_grads=trial.num_grads),
            data_stderr=stderr,
            radius=bracket.middle,
            target=self.target,
            criterion=self.criterion,
            magnitude_aware=self.magnitude_aware,
            start=trial.start,
            seed=trial.seed,
            num_evaluations=trial.num_evaluations,
            detail=bracket.detail,
        )


@dataclass(frozen=True, kw_only=True)
class PacBayesFlatness(_Tolerated):
    """Settings of :func:`pac_bayes_flatness`."""

    name = "pac_bayes_flatness"
    description = (
        "PAC-Bayes flatness, one over the largest variance of weight noise that keeps "
        "the error within its target, by bisection"
    )

    num_draws: NumSamples = 16

    def cost(self) -> int:
        """Return a third of a gradient for each draw at each size tried."""
        return math.ceil((most_trials(self.tol) + _ERROR_TRIALS) * self.num_draws / 3)

    def typical_cost(self) -> int:
        """Return the same for the usual number of sizes."""
        return math.ceil(_USUAL_TRIALS * self.num_draws / 3)

    def result(self, risk: EmpiricalRisk, generator: torch.Generator) -> PacBayesResult:
        """Find the largest noise for a risk, with what is needed to read the result."""
        risk = risk.in_precision(torch.float32)
        with risk.evaluating():
            trial = CriterionIncrease(
                risk, self.criterion, self.magnitude_aware, generator
            )

            def increase(sigma: float) -> float:
                return float(trial.under_noise(sigma, self.num_draws).mean())

            result = bracketed(increase, self.target, tol=self.tol)
            estimate, error = crossing(result), None
            if result.resolved:
                estimate = replace(
                    estimate,
                    error_source=ErrorSource.PROBES,
                    num_samples=self.num_draws,
                )
                estimate, error = _with_noise_error(estimate, trial, self.num_draws)
        return self._result(result, trial, estimate, error)


@dataclass(frozen=True, kw_only=True)
class PacBayesSharpness(_Tolerated):
    """Settings of :func:`pac_bayes_sharpness`."""

    name = "pac_bayes_sharpness"
    description = (
        "one over the square of the largest displacement that keeps the error within "
        "its target, by ascent and bisection (a lower bound)"
    )

    steps: PositiveInt = 10
    restarts: Count = 0

    def cost(self) -> int:
        """Return the gradients of the ascents at each size tried."""
        each = (self.restarts + 1) * (self.steps + 1) + 1
        return 1 + (most_trials(self.tol) + _ERROR_TRIALS) * each

    def typical_cost(self) -> int:
        """Return the same for the usual number of sizes."""
        return 1 + _USUAL_TRIALS * (self.restarts + 1) * (self.steps + 1)

    def result(self, risk: EmpiricalRisk, generator: torch.Generator) -> PacBayesResult:
        """Find the largest displacement for a risk."""
        risk = risk.in_precision(torch.float32)
        with risk.evaluating():
            trial = CriterionIncrease(
                risk, self.criterion, self.magnitude_aware, generator
            )
            result = bracketed(
                lambda alpha: self._increase(trial, alpha), self.target, tol=self.tol
            )
            estimate, error = crossing(result), None
            if result.resolved:
                estimate = replace(
                    estimate, error_source=ErrorSource.SOLVER, side="lower"
                )
                error = self._data_stderr(trial, result.middle)
        return self._result(result, trial, estimate, error)

    def _increase(self, trial: CriterionIncrease, alpha: float) -> float:
        return trial.under_ascent(alpha, steps=self.steps, restarts=self.restarts)

    def _data_stderr(self, trial: CriterionIncrease, alpha: float) -> float | None:
        """Error of ``1/alpha²`` over batches, the displacement taken as found."""
        shares = trial.shares()
        if shares is None or len(shares) < 2:
            return None
        point = trial.highest_point(alpha, steps=self.steps, restarts=self.restarts)
        if point is None:
            return None
        increases = trial.parts_at(point) - trial.parts_at(None)
        factor = error_factor(alpha, lambda size: self._increase(trial, size))
        return times(data_stderr(increases, shares), factor)


@checked
def pac_bayes_flatness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    target: float = PacBayesFlatness.target,
    criterion: Criterion = PacBayesFlatness.criterion,
    magnitude_aware: bool = PacBayesFlatness.magnitude_aware,
    num_draws: int = PacBayesFlatness.num_draws,
    tol: float = PacBayesFlatness.tol,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> PacBayesResult:
    r"""Return one over the largest variance of weight noise that a network tolerates.

    .. math:: 1/\sigma^2, \quad \sigma = \max\{\sigma :
              \mathbb{E}_{u}\, \mathrm{err}(w + u) \le \mathrm{err}(w) + \tau\}

    with ``u ~ N(0, sigma²)`` or, magnitude-aware, ``u_i ~ N(0, sigma² w_i² + 1e-6)``.
    The size is found by bisection on the same draws throughout, so that the increase is
    a function of it; it is bracketed first.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        target: The increase that is allowed.
        criterion: ``"error"``, the share of misclassified examples, or ``"loss"``.
        magnitude_aware: Whether noise is in proportion to each weight.
        num_draws: Draws of the noise.
        tol: Relative width of the last bracket of ``sigma``.
        generator: Source of the noise; by default a fresh one.

    Returns:
        ``1/sigma²`` with its standard error over draws, by the slope of the increase,
        and half the width of the last bracket as ``bound``; NaN with
        ``Status.NOT_RESOLVED`` where no size reaches the target, or none is below it.

    Raises:
        UsageError: If an argument is out of range, or there is no error rate.

    Source:
        Jiang et al. 2020, arXiv:1912.02178, appendix.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.zeros_(model.weight)  # the minimum
        >>> result = nk.pac_bayes_flatness(
        ...     model,
        ...     loss_fn,
        ...     batches,
        ...     criterion="loss",
        ...     target=0.1,
        ...     num_draws=1000,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> print(result.estimate)  # sigma² tr H / 2 = 0.1, so that 1/sigma² = 25
        24.39 [22.7, 26.24]
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = PacBayesFlatness(
        target=target,
        criterion=criterion,
        magnitude_aware=magnitude_aware,
        num_draws=num_draws,
        tol=tol,
    )
    return measure.result(risk, entropy_generator(generator))


@checked
def pac_bayes_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    target: float = PacBayesSharpness.target,
    criterion: Criterion = PacBayesSharpness.criterion,
    magnitude_aware: bool = PacBayesSharpness.magnitude_aware,
    steps: int = PacBayesSharpness.steps,
    restarts: int = PacBayesSharpness.restarts,
    tol: float = PacBayesSharpness.tol,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> PacBayesResult:
    r"""Return one over the square of the largest displacement that a network tolerates.

    .. math:: 1/\alpha^2, \quad \alpha = \max\{\alpha : \max_{|u_i| \le \alpha}
              \mathrm{err}(w + u) \le \mathrm{err}(w) + \tau\}

    and with ``|u_i| <= alpha |w_i| + 1e-3`` where magnitude-aware. Of each box the
    point is taken that projected ascent of the *loss* finds, so that ``alpha`` is an
    upper bound and the value a lower one.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        target: The increase that is allowed.
        criterion: ``"error"``, the share of misclassified examples, or ``"loss"``.
        magnitude_aware: Whether displacements are in proportion to each weight.
        steps: Steps of each ascent.
        restarts: Further ascents, each from a random corner.
        tol: Relative width of the last bracket of ``alpha``.
        generator: Source of random starts; by default a fresh one.

    Returns:
        ``1/alpha²`` as a lower bound; half the width of the last bracket is
        ``bound``; NaN with ``Status.NOT_RESOLVED`` where no size reaches the target,
        or none is below it.

    Raises:
        UsageError: If an argument is out of range, or there is no error rate.

    Source:
        Jiang et al. 2020, arXiv:1912.02178, appendix.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = PacBayesSharpness(
        target=target,
        criterion=criterion,
        magnitude_aware=magnitude_aware,
        steps=steps,
        restarts=restarts,
        tol=tol,
    )
    return measure.result(risk, entropy_generator(generator))


def _with_noise_error(
    estimate: Estimate, trial: CriterionIncrease, num_draws: int
) -> WithDataError:
    """Errors of ``1/sigma²``: those of the increase over its slope in log sigma.

    Few draws of an increase that one direction dominates are skewed, and less so on the
    log scale.
    """
    sigma = estimate.value**-0.5
    parts = trial.parts_under_noise(sigma, num_draws)
    increases = parts.sum(1)
    mean = float(increases.mean())
    left_out = (increases.sum() - increases) / (num_draws - 1)
    factor = error_factor(
        sigma, lambda size: float(trial.under_noise(size, num_draws).mean())
    )
    over_data = times(data_stderr(parts.mean(0), trial.shares()), factor)
    plain = jackknife(mean, left_out)
    stderr = times(plain.stderr, factor)
    if stderr is None:
        return estimate, over_data
    logs, ratio = plain, None
    if mean > 0 and bool((left_out > 0).all()):
        logs = jackknife(math.log(mean), left_out.log())
        share = factor * mean / estimate.value
        centre = math.log(estimate.value) + share * (logs.centre - math.log(mean))
        ratio = LogRatio(centre, share * logs.stderr)
    return replace(estimate, stderr=stderr, dof=logs.dof, ratio=ratio), over_data
