"""Root finding for an increasing function of a scale: bracketing, then bisection."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from noisekit.core.results import Estimate, Status

_START = 1e-2
_GROWTH = 4.0
_SMALLEST, _LARGEST = 1e-9, 1e6

_SLOPE_FACTOR = 1.25
"""Ratio of the sizes of the central difference that gives the slope."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """Two sizes between which the target is crossed.

    Attributes:
        low: A size whose increase is within the target; 0 where none was found.
        high: A size whose increase is above it; infinite where none was found.
        detail: Why there is no crossing, where there is none.
    """

    low: float
    high: float
    detail: str = ""

    @property
    def resolved(self) -> bool:
        """Whether both ends were found."""
        return self.low > 0 and math.isfinite(self.high)

    @property
    def middle(self) -> float:
        """The geometric mean of both ends; the end that is known, if one is not."""
        return math.sqrt(self.low * self.high) if self.resolved else self.low


def bracketed(
    increase: Callable[[float], float], target: float, *, tol: float
) -> Bracket:
    """Return a bracket of relative width ``tol`` of where ``increase`` is ``target``.

    Sizes are tried by factors of four from 0.01 until they lie on both sides, then
    the bracket is halved on the log scale. A function that is not monotone is crossed
    somewhere all the same, and below the size where it first was above the target.
    """
    low, high = 0.0, math.inf
    size = _START
    while not (low > 0 and math.isfinite(high)):
        if increase(size) <= target:
            low = size
            size *= _GROWTH
        else:
            high = size
            size /= _GROWTH
        if size > _LARGEST:
            return Bracket(low, high, f"no size up to {low:.3g} reaches the target")
        if size < _SMALLEST:
            return Bracket(
                low, high, f"no size down to {high:.3g} is within the target"
            )
    while high / low > 1 + tol:
        middle = math.sqrt(low * high)
        if increase(middle) <= target:
            low = middle
        else:
            high = middle
    return Bracket(low, high)


def most_trials(tol: float) -> int:
    """Return the largest number of sizes that a bracket of width ``tol`` takes."""
    up = math.log(_LARGEST / _START, _GROWTH)
    down = math.log(_START / _SMALLEST, _GROWTH)
    halvings = math.log2(math.log(_GROWTH) / math.log1p(tol))
    return math.ceil(max(up, down)) + max(0, math.ceil(halvings)) + 2


def crossing(bracket: Bracket) -> Estimate:
    """Return one over the squared size, with half the bracket's width as its bound."""
    if not bracket.resolved:
        return Estimate(math.nan, status=Status.NOT_RESOLVED)
    bound = (1 / bracket.low**2 - 1 / bracket.high**2) / 2
    return Estimate(1 / bracket.middle**2, bound=bound)


def error_factor(size: float, increase: Callable[[float], float]) -> float:
    """Return ``|d(1/s²) / d increase|``, which carries an error of the increase over.

    By the delta method ``d(1/s²) = -2/s³ ds`` and ``ds = d increase / slope``. The
    slope is a central difference in ``log s``, and in the log of the increase as well
    where that is positive on both sides: exact for a power law, as at a minimizer.
    """
    above = increase(size * _SLOPE_FACTOR)
    below = increase(size / _SLOPE_FACTOR)
    if below > 0 and 0 < above < math.inf:
        change = math.sqrt(above * below) * math.log(above / below)
    else:
        change = above - below
    slope = change / (2 * math.log(_SLOPE_FACTOR))  # d increase / d log s
    return 2 / slope / size**2 if slope > 0 else math.nan


def times(error: float | None, factor: float) -> float | None:
    """Return an error times a factor; ``None`` where either is not known."""
    if error is None or not 0 < factor < math.inf or not math.isfinite(error):
        return None
    return factor * error
