"""Where an increasing function of a size crosses a target: bracket, then bisect."""

import math
from collections.abc import Callable
from dataclasses import dataclass

_START = 1e-2
_GROWTH = 4.0
_SMALLEST, _LARGEST = 1e-9, 1e6


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
