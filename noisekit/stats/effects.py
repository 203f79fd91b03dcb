"""Effects over pairs, with Student's t-intervals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Interval, Status

Scale = Literal["ratio", "difference"]
"""How two arms are compared: ratio of geometric means, or difference of means."""

NO_EFFECT: Mapping[Scale, float] = MappingProxyType({"ratio": 1.0, "difference": 0.0})
"""The value of no effect on each scale."""


@dataclass(frozen=True, slots=True)
class PairedEffect:
    """The mean effect over pairs, with Student's t behind its intervals.

    Attributes:
        estimate: Mean of the differences, or of the log ratios, over pairs.
        scale: Whether ``estimate`` is of differences or of log ratios.
    """

    estimate: Estimate
    scale: Scale

    @property
    def effect(self) -> float:
        """Difference of means, or treatment over reference as geometric means."""
        return self._as_effect(self.estimate.value)

    @property
    def num_pairs(self) -> int:
        """Pairs behind the effect."""
        return self.estimate.num_samples or 0

    def interval(self, level: float = 0.95) -> Interval:
        """Return the t-interval of the effect, in the effect's own unit.

        Unbounded where all pairs give the same difference, so that no spread is known.
        """
        inner = self.estimate.interval(level)
        return Interval(self._as_effect(inner.low), self._as_effect(inner.high), level)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of no effect.

        At most ``1 - level`` exactly where ``interval(level)`` excludes no effect.
        """
        return self.p_value_of(NO_EFFECT[self.scale])

    def p_value_of(self, null: float) -> float:
        """Return the two-sided p-value of an effect of ``null``, in its own unit.

        At most ``1 - level`` exactly where ``interval(level)`` excludes ``null``.
        """
        estimate = self.estimate
        if estimate.status is not Status.OK or estimate.dof is None:
            return 1.0
        inner = math.log(null) if self.scale == "ratio" else null
        statistic = abs(estimate.value - inner) / float(estimate.stderr or math.inf)
        return 2.0 * float(stdtr(estimate.dof, -statistic))

    def _as_effect(self, value: float) -> float:
        if self.scale == "difference":
            return value
        try:
            return math.exp(value)
        except OverflowError:
            return math.inf


def paired_effect(
    treatment: ArrayLike, reference: ArrayLike, *, scale: Scale = "difference"
) -> PairedEffect:
    """Return the mean paired effect of treatment against reference.

    Pairs are the same seed under two arms, so what a seed does to both cancels.
    Student's t is exact for normal differences (log ratios) and, unlike a percentile
    bootstrap, keeps its level at five or ten pairs.

    Args:
        treatment: One value per pair.
        reference: The same pairs under the other arm, in the same order.
        scale: ``"difference"`` for ``treatment - reference``; ``"ratio"`` for
            ``log(treatment / reference)``, whose mean gives a ratio of geometric means.

    Returns:
        The effect; its ``estimate`` has status ``NOT_RESOLVED`` and an infinite
        standard error where all pairs agree to rounding, since a spread of zero
        between seeds means that nothing varied, not that the effect is known exactly.

    Raises:
        UsageError: If the values are not two equally long rows of at least 2 finite
            numbers, or not all positive where ``scale`` is ``"ratio"``.

    Example:
        >>> effect = paired_effect([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], scale="difference")
        >>> effect.effect, str(effect.interval())
        (2.0, '[-0.4841, 4.484]')
    """
    first = np.asarray(treatment, dtype=np.float64)
    second = np.asarray(reference, dtype=np.float64)
    fault = _pairs_fault(first, second, scale)
    if fault:
        raise UsageError(fault)
    if scale == "ratio":
        first, second = np.log(first), np.log(second)
    differences = first - second  # (n,), in logs for a ratio
    num_pairs = differences.size
    spread = float(differences.std(ddof=1))
    # Rounding of a difference is a few eps of its values, and of a log at least eps,
    # since log(x (1 + eps)) = log(x) + eps.
    largest = max(1.0 if scale == "ratio" else 0.0, *np.abs([first, second]).ravel())
    resolved = spread > 4.0 * np.finfo(np.float64).eps * largest
    return PairedEffect(
        Estimate(
            value=float(differences.mean()),
            stderr=spread / math.sqrt(num_pairs) if resolved else math.inf,
            error_source=ErrorSource.SEEDS,
            num_samples=num_pairs,
            dof=float(num_pairs - 1),
            status=Status.OK if resolved else Status.NOT_RESOLVED,
        ),
        scale,
    )


def margin_fault(margin: float, *, scale: Scale) -> str:
    """Return what is wrong with a margin, or nothing where it fits its scale."""
    least = 1.0 if scale == "ratio" else 0.0
    if math.isfinite(margin) and margin > least:
        return ""
    return (
        f"needs a finite margin above {least:g} for a {scale}, got {margin:g}; give "
        f"the smallest {scale} that would matter."
    )


def _pairs_fault(
    first: NDArray[np.float64], second: NDArray[np.float64], scale: Scale
) -> str:
    if first.ndim != 1 or first.shape != second.shape:
        return (
            "paired values need two rows of equal length, got shapes "
            f"{first.shape} and {second.shape}; pair the arms by seed first."
        )
    if first.size < 2:
        return (
            f"a paired interval needs at least 2 pairs, got {first.size}; run more "
            "seeds in both arms."
        )
    missing = int(np.sum(~(np.isfinite(first) & np.isfinite(second))))
    if missing:
        return (
            f"paired values need to be finite, got {missing} of {first.size} pairs "
            "with NaN or infinity; decide what a missing pair means before leaving "
            "it out."
        )
    not_positive = int(np.sum((first <= 0.0) | (second <= 0.0)))
    if scale == "ratio" and not_positive:
        least = float(min(first.min(), second.min()))
        return (
            f"a ratio needs positive values, got {not_positive} of {first.size} pairs "
            f"with one at or below zero (least {least:.4g}); use scale='difference'."
        )
    return ""
