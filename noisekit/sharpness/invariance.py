"""What a measure is worth: whether it changes where the function does not."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from noisekit.core.arguments import call_given, checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy, unwrap_compiled
from noisekit.core.normalisation import Normaliser
from noisekit.core.randomness import preserve_rng_state
from noisekit.core.results import Estimate, Interval, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import Fraction
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.invariance_report import (
    Invariance,
    InvarianceReport,
    RescalingEffect,
)
from noisekit.sharpness.measurement import Measure
from noisekit.sharpness.measures import chosen_measures
from noisekit.sharpness.rescaling.free_rescalings import (
    RescaleFn,
    free_rescalings,
    rescaled_by,
)
from noisekit.sharpness.rescaling.rescaling import verified_change

_LEVEL = 0.95

# A measure returns an Estimate, a number, or a result that has ``.estimate``.
MeasureFn = Callable[[nn.Module, LossFn, Iterable[Batch]], Any]


@checked
def check_invariance(
    measure: MeasureFn | Measure | str,
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    rescalings: Mapping[str, RescaleFn] | None = None,
    factors: Iterable[float] = (2.0, 4.0, 8.0),
    tolerance: Fraction = 0.01,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
) -> InvarianceReport:
    r"""Return what a measure does under rescalings that keep the network's function.

    A measure of sharpness that changes here is a property of the weights, not
    about the function they compute, and so cannot by itself explain a test error.
    Every rescaled copy is verified on all data to have the same outputs.

    The verdict compares each ratio's interval with ``1 ± tolerance``: outside is *not
    invariant*, inside at all factors is *invariant*, else *not resolved*. The
    intervals hold together in 95 % of checks (Bonferroni over all ratios). Of a
    measure that repeats itself bit by bit, a ratio inside counts whatever its error.

    Arguments that are not listed are those of
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        measure: ``measure(model, loss_fn, batches)``, an ``Estimate``, a number
            or a result with ``.estimate``. Each call starts from the same global
            random state; give it a generator with a fixed seed to make it repeatable.
            Or the name of one of noisekit's measures, or an object such as
            ``WorstCase(rho=0.1)``, which get the same random numbers each time.
        model: The network, or its :class:`EmpiricalRisk`; not changed, nor seen by
            the measure: that gets copies.
        batches: Pairs ``(inputs, targets)``, held in memory where they fit.
        rescalings: By name, functions of a copy of the model and a factor that change
            the copy or return a new state dict or model. By default what is known:
            layers and neurons of chains of linear and convolutional layers with
            ReLU-like ones between, and layers before a BatchNorm in any model.
        factors: At least two, above 0 and not 1.
        tolerance: Relative change that does not count.
        generator: Of the neurons' random factors; by default a fresh one.
        bn: What BatchNorm normalises with, for the outputs and the loss that are
            compared; the measure has its own.

    Returns:
        Ratios, exponents and a verdict for each family.

    Raises:
        UsageError: If no rescaling is known or given, one changes the function or no
            weight, or an argument is out of range.

    Source:
        Dinh et al. 2017, arXiv:1703.04933, sections 3 and 5; Neyshabur et al. 2015,
        arXiv:1506.02617, for single neurons.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)
        ... )
        >>> batches = [(torch.randn(16, 2), torch.randint(3, (16,)))]
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> print(nk.check_invariance(nk.fisher_rao_norm, model, loss_fn, batches))
        fisher_rao_norm: invariant (ratios at factors 2, 4, 8)
          layers       1, 1, 1: invariant; ...
          neurons      1, 1, 1: invariant; ...
    """
    chosen = _checked_factors(factors, tolerance)
    drawn = entropy_generator(generator)
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser)
    name, take = _named(measure, drawn, bn=risk.bn, normaliser=risk.normaliser)
    families = rescalings
    if families is None:
        first = next(iter(risk.batches))
        families = free_rescalings(risk.model, first, generator=drawn)
    if not families:
        raise UsageError("rescalings needs at least one function, got none.")

    def measured(of: nn.Module) -> Estimate:
        with preserve_rng_state():
            return as_estimate(take(copy.deepcopy(of), risk.loss_fn, risk.batches))

    def loss_of(twin: nn.Module) -> float:
        other = EmpiricalRisk(
            twin, risk.loss_fn, risk.batches, bn=risk.bn, normaliser=risk.normaliser
        )
        return other.value()

    value, again = measured(risk.model), measured(risk.model)
    if not math.isfinite(value.value):
        raise UsageError(
            f"an invariance check needs a measure that is finite, got {value.value} of "
            "the model itself; look for NaN in the batches and the weights."
        )
    subject = _Subject(
        risk=risk,
        measured=measured,
        loss_of=loss_of,
        value=value,
        again=again,
        tolerance=tolerance,
        num_ratios=len(chosen) * len(families),
    )
    effects = tuple(_effect(subject, *family, chosen) for family in families.items())
    return InvarianceReport(name, value, subject.repeatable, tolerance, effects)


def as_estimate(result: object) -> Estimate:
    """Return a measure's result as an estimate.

    Raises:
        UsageError: If it is none and has none.
    """
    if isinstance(result, Estimate):
        return result
    inner = getattr(result, "estimate", None)
    inner = inner() if callable(inner) else inner
    if isinstance(inner, Estimate):
        return inner
    try:
        return Estimate(float(result))  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            "a measure needs to return an Estimate, a number or a result with "
            f".estimate, got a {type(result).__name__}."
        ) from error


@dataclass(frozen=True, slots=True)
class _Subject:
    """A measure at the weights as they are, to compare with."""

    risk: EmpiricalRisk
    measured: Callable[[nn.Module], Estimate]
    loss_of: Callable[[nn.Module], float]
    value: Estimate
    again: Estimate
    tolerance: float
    num_ratios: int

    @property
    def repeatable(self) -> bool:
        return self.value.value == self.again.value


def _effect(
    subject: _Subject, name: str, rescale: RescaleFn, factors: tuple[float, ...]
) -> RescalingEffect:
    loss = subject.risk.value()
    ratios, intervals, changes, losses = [], [], [], []
    for factor in factors:
        twin, change = _verified_twin(subject.risk, name, rescale, factor)
        after = subject.measured(twin)
        ratio = _ratio(after.value, subject.value.value)
        ratios.append(ratio)
        intervals.append(_interval(ratio, after, subject))
        changes.append(change)
        rise = abs(subject.loss_of(twin) - loss)
        losses.append(rise / abs(loss) if rise else 0.0)
    exponent, misfit, last = _power_law(factors, ratios)
    return RescalingEffect(
        name=name,
        factors=factors,
        ratios=tuple(ratios),
        intervals=tuple(intervals),
        function_changes=tuple(changes),
        loss_changes=tuple(losses),
        exponent=exponent,
        misfit=misfit,
        last_exponent=last,
        verdict=_verdict(ratios, intervals, subject),
    )


def _verified_twin(
    risk: EmpiricalRisk, name: str, rescale: RescaleFn, factor: float
) -> tuple[nn.Module, float]:
    """A rescaled copy that has the same function and other weights."""
    twin = unwrap_compiled(rescaled_by(copy.deepcopy(risk.model), rescale, factor))
    own, other = risk.model.state_dict(), twin.state_dict()
    if all(torch.equal(other[key], own[key]) for key in own if key in other):
        raise UsageError(
            f"rescaling {name!r} needs to change weights, got a copy with the same "
            f"ones at factor {factor:g}; change the copy, or return its new state."
        )
    batches = (batch for _, batch in risk.weighted_batches())
    what = f"what {name!r} rescales"
    return twin, verified_change(risk.model, twin, batches, bn=risk.bn, what=what)


def _ratio(after: float, before: float) -> float:
    if before == 0 or not math.isfinite(before):
        return math.nan
    return after / before


def _interval(ratio: float, after: Estimate, subject: _Subject) -> Interval:
    """Where the ratio lies, from both relative errors."""
    unreliable = (Status.NOT_CONVERGED, Status.NOT_RESOLVED, Status.DIVERGED)
    both = (after, subject.value)
    share = math.hypot(*(_relative_error(e, subject) for e in both))
    # Bounds are no errors that average out: they add.
    share += sum(e.bound / abs(e.value) for e in both if e.bound and e.value)
    if any(e.status in unreliable for e in both) or not share < 1:
        return Interval(-math.inf, math.inf, _LEVEL)
    ends = ratio / (1 + share), ratio / (1 - share)
    return Interval(min(ends), max(ends), _LEVEL)


def _relative_error(estimate: Estimate, subject: _Subject) -> float:
    """Half of an interval over the value; 0 where an exact number was given."""
    if estimate.bound is not None or estimate.side == "lower":
        return 0.0
    if estimate.stderr is None and estimate.ratio is None:
        if subject.repeatable:
            return 0.0
        # Without an error of its own, two calls show its scatter; with one
        # degree of freedom that is not much.
        spread = abs(subject.value.value - subject.again.value)
        estimate = replace(estimate, stderr=spread / math.sqrt(2), dof=1)
    interval = estimate.interval(1 - (1 - _LEVEL) / subject.num_ratios)
    half = (interval.high - interval.low) / 2
    return half / abs(estimate.value) if estimate.value else math.inf


def _verdict(
    ratios: list[float], intervals: list[Interval], subject: _Subject
) -> Invariance:
    high = 1 + subject.tolerance
    low = 1 / high
    if any(i.low > high or i.high < low for i in intervals):
        return Invariance.NOT_INVARIANT
    inside = all(low <= ratio <= high for ratio in ratios)
    sure = all(low <= i.low and i.high <= high for i in intervals)
    if inside and (sure or subject.repeatable):
        return Invariance.INVARIANT
    return Invariance.NOT_RESOLVED


def _power_law(
    factors: tuple[float, ...], ratios: list[float]
) -> tuple[float, float, float]:
    """Exponent, largest misfit, and exponent between the two largest factors."""
    if not all(math.isfinite(r) and r > 0 for r in ratios):
        return math.nan, math.nan, math.nan
    x, y = np.log(factors), np.log(ratios)
    exponent = float(x @ y / (x @ x))
    largest, second = np.argsort(x)[[-1, -2]]
    last = float((y[largest] - y[second]) / (x[largest] - x[second]))
    return exponent, float(np.abs(y - exponent * x).max()), last


def _named(
    measure: MeasureFn | Measure | str,
    generator: torch.Generator,
    *,
    bn: BatchNormPolicy,
    normaliser: Normaliser | None,
) -> tuple[str, MeasureFn]:
    """A measure with its name."""
    if isinstance(measure, str | Measure):
        chosen = chosen_measures(measure)[0]
        bits = torch.randint(2**31, (), generator=generator, device=generator.device)
        return chosen.name, _seeded(chosen, int(bits), bn=bn, normaliser=normaliser)
    inner = getattr(measure, "func", measure)  # of functools.partial
    name = str(getattr(inner, "__name__", type(inner).__name__))
    taken = "the model, the loss and the batches"
    return name, partial(call_given, "measure", measure, takes=taken)


def _seeded(
    measure: Measure, seed: int, *, bn: BatchNormPolicy, normaliser: Normaliser | None
) -> MeasureFn:
    """The first quantity of a measure, with the same random numbers each time."""

    def take(model: nn.Module, loss_fn: LossFn, batches: Iterable[Batch]) -> Estimate:
        risk = EmpiricalRisk(model, loss_fn, batches, bn=bn, normaliser=normaliser)
        return measure.estimate(risk, generator=torch.Generator().manual_seed(seed))

    return take


def _checked_factors(factors: Iterable[float], tolerance: float) -> tuple[float, ...]:
    chosen = tuple(float(factor) for factor in factors)
    good = all(0 < f < math.inf and f != 1 for f in chosen)
    if not good or len(set(chosen)) < 2:
        raise UsageError(
            "factors needs at least two different ones above 0 that are not 1, got "
            f"{', '.join(f'{f:g}' for f in chosen) or 'none'}."
        )
    return chosen
