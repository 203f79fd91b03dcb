"""The largest gap between two arms' curves, against what chance gives."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from noisekit.core.errors import UsageError
from noisekit.core.results import Interval
from noisekit.stats.curves import curves_fault
from noisekit.stats.effects import NO_EFFECT, Scale

_FLIPS = 4096
"""Sign assignments behind a simultaneous band; all of them up to 12 seeds."""
_POINTS = 64
"""Points of a curve taken at once."""


@dataclass(frozen=True, slots=True)
class PermutationBand:
    """Mean paired difference of curves, and how large it gets by chance.

    Attributes:
        difference: Mean over pairs of treatment minus reference, at each point.
        threshold: The largest gap that chance exceeds in at most ``1 - level`` of sign
            assignments; infinite where there are too few pairs to reach the level.
        max_difference: Largest absolute value of ``difference``.
        p_value: Share of sign assignments with a largest gap at least as large.
        num_assignments: Sign assignments looked at, the one seen included.
        exact: Whether these were all.
        level: Level of ``threshold``.
    """

    difference: NDArray[np.float64]
    threshold: float
    max_difference: float
    p_value: float
    num_assignments: int
    exact: bool
    level: float


def permutation_band(
    treatment: ArrayLike,
    reference: ArrayLike,
    *,
    generator: np.random.Generator,
    level: float = 0.95,
    num_assignments: int = 10_000,
) -> PermutationBand:
    """Return the largest paired gap between two arms' curves, and its null threshold.

    The largest gap along a curve is above zero whatever the arms, so it is compared
    with the largest gaps when the arms are exchanged within pairs at random. All
    ``2^n`` exchanges are evaluated if they are at most ``num_assignments``, and the
    test is then exact; its p-value is never below ``2/2^n``, which is 0.0625 for five
    seeds.

    Args:
        treatment: One row per seed, one column per grid point.
        reference: The same seeds and points under the other arm.
        generator: Source of exchanges where they are drawn.
        level: Level of the threshold.
        num_assignments: Most exchanges to evaluate.

    Raises:
        UsageError: If the tables differ in shape, have fewer than 2 seeds or missing
            values, or the level or number of assignments is out of range.

    Source:
        Holmes et al. 1996, "Nonparametric analysis of statistic images from functional
        mapping experiments", for the maximum over points.
    """
    first, second = np.asarray(treatment, np.float64), np.asarray(reference, np.float64)
    fault = _pairs_fault(first, second) or curves_fault(first, level)
    if fault or num_assignments < 2:
        fault = fault or f"needs at least 2 assignments, got {num_assignments}."
        raise UsageError(f"a permutation band {fault}")
    gaps = first - second  # (seeds, points)
    # Exchanging the arms of a pair flips the sign of its gap, so that every exchange is
    # a product with signs (assignments, seeds). The maximum over points accounts for
    # looking at all of them.
    signs, exact = _sign_assignments(gaps.shape[0], num_assignments, generator)
    largest = np.abs(signs @ gaps).max(axis=1) / gaps.shape[0]
    observed = float(largest[0])
    # Sums in another order differ in the last bits; equal gaps must count as equal.
    tolerance = 1e-12 * float(np.abs(gaps).max())
    ordered = np.sort(largest)
    return PermutationBand(
        difference=gaps.mean(axis=0),
        threshold=_threshold(ordered, level, tolerance),
        max_difference=observed,
        p_value=float(np.mean(largest >= observed - tolerance)),
        num_assignments=int(largest.size),
        exact=exact,
        level=level,
    )


@dataclass(frozen=True, slots=True)
class SimultaneousBand:
    """The largest gap between two curves, with a band that holds along all of them.

    Attributes:
        gaps: Treatment minus reference, one row per seed and one column per point; of
            logarithms where ``scale`` is ``"ratio"``.
        scale: The scale of ``effect`` and its interval.
        p_value: Of no gap anywhere, from exchanges within pairs.
        place: Column of the largest gap of the means.
    """

    gaps: NDArray[np.float64]
    scale: Scale
    p_value: float
    place: int

    @property
    def effect(self) -> float:
        """Largest absolute gap of the mean curves; at least the value of no effect."""
        return self._as_effect(float(np.abs(self.gaps.mean(axis=0)).max()))

    def interval(self, level: float = 0.95) -> Interval:
        """Return an interval of the largest gap of the true mean curves.

        A band that holds the true gap at all points at once with probability ``level``
        bounds its largest value from both sides, so the interval is conservative. Its
        width is the quantile of the largest Student statistic along the curve when the
        signs of the seeds' residuals are drawn at random. Unbounded above for fewer
        than 6 seeds, whose sign assignments do not reach 95 %.

        Source:
            Wu 1986, "Jackknife, bootstrap and other resampling methods in regression
            analysis", for the signs; the maximum as in ``permutation_band``.
        """
        mean = self.gaps.mean(axis=0)  # (points,)
        quantile = self._quantile(level)
        if math.isinf(quantile):
            return Interval(NO_EFFECT[self.scale], math.inf, level)
        half = quantile * _stderr(self.gaps)
        low = max(0.0, float((np.abs(mean) - half).max()))
        high = float((np.abs(mean) + half).max())
        return Interval(self._as_effect(low), self._as_effect(high), level)

    def _quantile(self, level: float) -> float:
        count, points = self.gaps.shape
        generator = np.random.default_rng(0)
        signs, _ = _sign_assignments(count, _FLIPS, generator)
        residuals = self.gaps - self.gaps.mean(axis=0)
        squares = np.square(residuals).sum(axis=0)
        largest = np.zeros(len(signs))
        with np.errstate(invalid="ignore", divide="ignore"):
            for start in range(0, points, _POINTS):
                part = slice(start, start + _POINTS)
                means = signs @ residuals[:, part] / count  # (flips, points)
                # Variances of the sign-flipped residuals, sum x^2 - n mean^2: flips do
                # not change the squares.
                variance = (squares[part] - count * means**2) / (count - 1)
                statistic = np.abs(means) / np.sqrt(np.maximum(variance, 0.0) / count)
                largest = np.fmax(largest, np.fmax.reduce(statistic, axis=1))
        return _threshold(np.sort(largest), level, 0.0)

    def _as_effect(self, value: float) -> float:
        return math.exp(value) if self.scale == "ratio" else value


def _stderr(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = np.asarray(rows.std(axis=0, ddof=1), dtype=np.float64)
    return deviation / math.sqrt(len(rows))


def _threshold(ordered: NDArray[np.float64], level: float, tolerance: float) -> float:
    """Smallest gap such that those at or above it are at most 1 - level of all."""
    allowed = math.floor((1.0 - level) * ordered.size + 1e-9)
    exceeds = ordered > ordered[ordered.size - allowed - 1] + tolerance
    return float(ordered[exceeds][0]) if bool(exceeds.any()) else math.inf


def _sign_assignments(
    num_seeds: int, most: int, generator: np.random.Generator
) -> tuple[NDArray[np.float64], bool]:
    """Rows of signs, the first all +1: every one, or that many drawn."""
    exact = num_seeds < 60 and 2**num_seeds <= most
    if exact:
        codes = np.arange(2**num_seeds)[:, None] >> np.arange(num_seeds)
        return np.where(codes & 1, -1.0, 1.0), True
    signs = generator.choice(np.array([-1.0, 1.0]), size=(most, num_seeds))
    signs[0] = 1.0
    return signs, False


def _pairs_fault(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    if first.shape != second.shape:
        return (
            "needs the same seeds and points in both arms, got shapes "
            f"{first.shape} and {second.shape}."
        )
    missing = int(np.sum(~(np.isfinite(first) & np.isfinite(second))))
    if missing:
        return (
            f"needs finite values, got {missing} pairs of points with NaN or infinity; "
            "use a common grid."
        )
    return ""
