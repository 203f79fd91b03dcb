"""PAC-Bayes flatness: how much noise, or how bad a displacement, a network stands."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import nn

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import ErrorSource, Estimate, LogRatio, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import WithDataError, data_stderr
from noisekit.sharpness.jackknife import jackknife
from noisekit.sharpness.measures.pac_bayes_trial import Criterion, RiseTrial
from noisekit.sharpness.search.ascent import AscentPlan
from noisekit.sharpness.search.bracket import Bracket, bracketed
from noisekit.sharpness.search.first_order import remarks

_SLOPE_FACTOR = 1.25
"""How far on either side the slope of the rise is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PacBayesFlatness:
    """One over the squared size of what a network stands; larger means sharper.

    Attributes:
        estimate: ``1 / radius²`` [1/param²; 1 where magnitude-aware].
        data_stderr: Its error over the batches to first order, noise or displacement
            taken as it was; ``None`` where there is one batch.
        radius: The largest size found that keeps the rise within the target.
        target: The rise that is allowed.
        criterion: Of what: the share of misclassified examples, or the loss.
        magnitude_aware: Whether sizes are in proportion to each weight.
        start: Error or loss at the weights themselves.
        seed: Seed of the generator of noise and random starts.
        num_evaluations: Evaluations of the criterion over all data.
        detail: Why there is no value, where there is none.
    """

    estimate: Estimate
    data_stderr: float | None
    radius: float
    target: float
    criterion: Criterion
    magnitude_aware: bool
    start: float
    seed: int
    num_evaluations: int
    detail: str

    @property
    def value(self) -> float:
        """One over the squared radius."""
        return self.estimate.value

    def __str__(self) -> str:
        """Write the value with both errors, the size, and why there is none."""
        within = f"keeps the {self.criterion} within {self.target:g} of its start"
        return remarks(
            f"{self.estimate}" + ("" if self.magnitude_aware else " 1/param²"),
            None if self.data_stderr is None else f"± {self.data_stderr:.2g} over data",
            f"size {self.radius:.4g} {within}" if math.isfinite(self.value) else None,
            self.detail,
        )

    def __float__(self) -> float:
        """Return the bare value."""
        return self.estimate.value


def pac_bayes_flatness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    target: float = 0.1,
    criterion: Criterion = "error",
    magnitude_aware: bool = False,
    num_draws: int = 16,
    tol: float = 0.01,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> PacBayesFlatness:
    r"""Return one over the largest variance of weight noise that a network stands.

    .. math:: 1/\sigma^2, \quad \sigma = \max\{\sigma :
              \mathbb{E}_{u}\, \mathrm{err}(w + u) \le \mathrm{err}(w) + \tau\}

    with ``u ~ N(0, sigma²)`` or, magnitude-aware, ``u_i ~ N(0, sigma² w_i² + 1e-6)``.
    The size is found by bisection on the same draws throughout, so that the rise is a
    function of it; it is bracketed first.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        target: The rise that is allowed.
        criterion: ``"error"``, the share of misclassified examples, or ``"loss"``.
        magnitude_aware: Whether noise is in proportion to each weight.
        num_draws: Draws of the noise.
        tol: Relative width of the last bracket of ``sigma``.
        generator: Source of the noise; by default a fresh one.

    Returns:
        ``1/sigma²`` with its standard error over draws, by the slope of the rise, and
        half the width of the last bracket as ``bound``; NaN with
        ``Status.NOT_RESOLVED`` where no size reaches the target, or none is below it.

    Raises:
        UsageError: If an argument is out of range, or there is no error rate.

    Source:
        Jiang et al. 2020, arXiv:1912.02178, appendix.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    _refuse_bad_arguments(target, tol, criterion)
    if num_draws < 2:
        raise UsageError(
            f"num_draws needs to be at least 2 for an error estimate, got {num_draws}."
        )
    drawn = entropy_generator(generator)
    risk = risk.in_precision(torch.float32)
    with risk.evaluating():
        trial = RiseTrial(risk, criterion, magnitude_aware, drawn)

        def rise(sigma: float) -> float:
            return float(trial.rises_under_noise(sigma, num_draws).mean())

        found = bracketed(rise, target, tol=tol)
        estimate, error = _crossing(found), None
        if found.resolved:
            estimate = replace(
                estimate, error_source=ErrorSource.PROBES, num_samples=num_draws
            )
            estimate, error = _with_noise_error(estimate, trial, num_draws)
    return _result(found, trial, estimate, target=target, data_stderr=error)


def pac_bayes_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    target: float = 0.1,
    criterion: Criterion = "error",
    magnitude_aware: bool = False,
    steps: int = 10,
    restarts: int = 0,
    tol: float = 0.01,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> PacBayesFlatness:
    r"""Return one over the square of the largest displacement that a network stands.

    .. math:: 1/\alpha^2, \quad \alpha = \max\{\alpha : \max_{|u_i| \le \alpha}
              \mathrm{err}(w + u) \le \mathrm{err}(w) + \tau\}

    and with ``|u_i| <= alpha |w_i| + 1e-3`` where magnitude-aware. Of each box the
    point is taken that projected ascent of the *loss* finds, so that ``alpha`` is an
    upper bound and the value a lower one.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        target: The rise that is allowed.
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
    _refuse_bad_arguments(target, tol, criterion)
    plan = AscentPlan(steps=steps, restarts=restarts)
    drawn = entropy_generator(generator)
    risk = risk.in_precision(torch.float32)
    with risk.evaluating():
        trial = RiseTrial(risk, criterion, magnitude_aware, drawn)
        found = bracketed(
            lambda alpha: trial.rise_at_peak(alpha, plan), target, tol=tol
        )
        estimate, error = _crossing(found), None
        if found.resolved:
            estimate = replace(estimate, error_source=ErrorSource.SOLVER, side="lower")
            error = _ascent_data_error(found.middle, trial, plan)
    return _result(found, trial, estimate, target=target, data_stderr=error)


def _with_noise_error(
    estimate: Estimate, trial: RiseTrial, num_draws: int
) -> WithDataError:
    """Errors of ``1/sigma²``: those of the rise over its slope in log sigma.

    Few draws of a rise that one direction dominates are skewed, and less so on the
    log scale.
    """
    sigma = estimate.value**-0.5
    parts = trial.parts_under_noise(sigma, num_draws)
    rises = parts.sum(1)
    mean = float(rises.mean())
    left_out = (rises.sum() - rises) / (num_draws - 1)
    factor = _error_factor(
        sigma, lambda size: float(trial.rises_under_noise(size, num_draws).mean())
    )
    over_data = _times(data_stderr(parts.mean(0), trial.shares()), factor)
    plain = jackknife(mean, left_out)
    stderr = _times(plain.stderr, factor)
    if stderr is None:
        return estimate, over_data
    logs, ratio = plain, None
    if mean > 0 and bool((left_out > 0).all()):
        logs = jackknife(math.log(mean), left_out.log())
        share = factor * mean / estimate.value
        centre = math.log(estimate.value) + share * (logs.centre - math.log(mean))
        ratio = LogRatio(centre, share * logs.stderr)
    return replace(estimate, stderr=stderr, dof=logs.dof, ratio=ratio), over_data


def _ascent_data_error(size: float, trial: RiseTrial, plan: AscentPlan) -> float | None:
    """Error of ``1/alpha²`` over batches, the displacement taken as found."""
    shares = trial.shares()
    if shares is None or len(shares) < 2:
        return None
    peak = trial.peak(size, plan)
    if peak is None:
        return None
    rises = trial.parts_at(peak) - trial.parts_at(None)
    factor = _error_factor(size, lambda alpha: trial.rise_at_peak(alpha, plan))
    return _times(data_stderr(rises, shares), factor)


def _error_factor(size: float, rise: Callable[[float], float]) -> float:
    """Error of one over the squared size for an error 1 of the rise at that size.

    The rise is taken as a power of the size where it is positive on both sides, which
    is exact at a minimiser.
    """
    above, below = rise(size * _SLOPE_FACTOR), rise(size / _SLOPE_FACTOR)
    if below > 0 and 0 < above < math.inf:
        change = math.sqrt(above * below) * math.log(above / below)
    else:
        change = above - below
    slope = change / (2 * math.log(_SLOPE_FACTOR))
    return 2 / slope / size**2 if slope > 0 else math.nan


def _times(error: float | None, factor: float) -> float | None:
    if error is None or not 0 < factor < math.inf or not math.isfinite(error):
        return None
    return factor * error


def _crossing(found: Bracket) -> Estimate:
    """One over the squared size, with half the bracket's width as its bound."""
    if not found.resolved:
        return Estimate(math.nan, status=Status.NOT_RESOLVED)
    bound = (1 / found.low**2 - 1 / found.high**2) / 2
    return Estimate(1 / found.middle**2, bound=bound)


def _result(
    found: Bracket,
    trial: RiseTrial,
    estimate: Estimate,
    *,
    target: float,
    data_stderr: float | None,
) -> PacBayesFlatness:
    return PacBayesFlatness(
        estimate=replace(estimate, num_grads=trial.num_grads),
        data_stderr=data_stderr,
        radius=found.middle,
        target=target,
        criterion=trial.criterion,
        magnitude_aware=trial.magnitude_aware,
        start=trial.start,
        seed=trial.seed,
        num_evaluations=trial.num_evaluations,
        detail=found.detail,
    )


def _refuse_bad_arguments(target: float, tol: float, criterion: str) -> None:
    if not target > 0:
        raise UsageError(f"target needs to be positive, got {target}; 0.1 is usual.")
    if not 0 < tol < 1:
        raise UsageError(f"tol needs to be between 0 and 1, got {tol}.")
    if criterion not in get_args(Criterion):
        raise UsageError(f"criterion needs to be 'error' or 'loss', got {criterion!r}.")
