"""Contrasts named before looking, their data by seed, and their results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from noisekit.core.errors import UsageError
from noisekit.core.results import Interval
from noisekit.core.vocabulary import QUANTITIES
from noisekit.stats.hypothesis import Scale, margin_fault


class Verdict(StrEnum):
    """What the data say about one contrast."""

    LARGER = "larger"
    """The 95 % interval lies above the margin."""
    SMALLER = "smaller"
    """The 95 % interval lies below the margin on the other side."""
    EQUIVALENT = "equivalent"
    """The 90 % interval lies inside the margin."""
    NOT_RESOLVED = "not resolved"
    """None of these; the seeds do not suffice."""
    NOT_COMPARABLE = "not comparable"
    """A fair-test rule is broken, such as unmatched training loss."""
    NOT_JUDGED = "not judged"
    """The runs make no claims, such as a smoke run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """One comparison of two arms, fixed before any run.

    Attributes:
        name: Unique within the recipe.
        quantity: Name in the vocabulary.
        treatment: Arm whose value is on top of the ratio, or first in the difference.
        reference: Arm that it is compared with.
        snapshot: Where in training both are measured.
        scale: Ratio of geometric means, or difference of means.
        margin: Smallest effect that matters; above 1 for a ratio, above 0 and in the
            quantity's unit for a difference.
        primary: Whether it belongs to the family that is adjusted for its size;
            any other is descriptive.
        paper: What a paper found, in words; stands beside the result, is not tested.
        description: What the contrast is for.

    Raises:
        UsageError: If the arms are the same, or scale or margin do not fit.
    """

    name: str
    quantity: str
    treatment: str
    reference: str
    snapshot: str
    scale: Scale
    margin: float
    primary: bool = False
    paper: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if self.scale not in ("ratio", "difference"):
            raise UsageError(
                f"contrast {self.name!r} needs scale 'ratio' or 'difference', got "
                f"{self.scale!r}."
            )
        if self.treatment == self.reference:
            raise UsageError(
                f"contrast {self.name!r} needs two different arms, got "
                f"{self.treatment!r} twice."
            )
        fault = margin_fault(self.margin, scale=self.scale)
        if fault:
            raise UsageError(f"contrast {self.name!r} {fault}")


@dataclass(frozen=True, slots=True)
class PairedSample:
    """Both arms' values by seed; NaN where a run gave none.

    Attributes:
        seeds: One per pair, each once.
        treatment: Value of the treatment arm per seed, NaN where missing.
        reference: Value of the reference arm per seed, NaN where missing.
        not_comparable: Why no verdict may be given, where a fair-test rule is broken.

    Raises:
        UsageError: If lengths differ or a seed occurs twice.
    """

    seeds: tuple[int, ...]
    treatment: tuple[float, ...]
    reference: tuple[float, ...]
    not_comparable: str | None = None

    def __post_init__(self) -> None:
        lengths = (len(self.seeds), len(self.treatment), len(self.reference))
        if len(set(lengths)) != 1:
            raise UsageError(
                "a paired sample needs one value per seed in both arms, got "
                f"{lengths[0]} seeds, {lengths[1]} treatment and {lengths[2]} "
                "reference values; write NaN for a missing one."
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise UsageError(
                f"a paired sample needs each seed once, got {list(self.seeds)}."
            )

    @classmethod
    def by_seed(
        cls,
        treatment: Mapping[int, float],
        reference: Mapping[int, float],
        *,
        seeds: Sequence[int] = (),
        not_comparable: str | None = None,
    ) -> "PairedSample":
        """Pair two arms by seed; what is in only one of them counts as missing.

        Args:
            treatment: Value by seed.
            reference: Value by seed.
            seeds: Seeds that were planned, so that one which is in neither arm still
                counts as missing.
            not_comparable: Why no verdict may be given, if so.
        """
        every = tuple(sorted({*seeds, *treatment, *reference}))
        return cls(
            seeds=every,
            treatment=tuple(float(treatment.get(s, math.nan)) for s in every),
            reference=tuple(float(reference.get(s, math.nan)) for s in every),
            not_comparable=not_comparable,
        )

    def complete(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the values of the pairs of which both sides are finite."""
        both = np.array([self.treatment, self.reference], dtype=np.float64)  # (2, n)
        kept = both[:, np.isfinite(both).all(axis=0)]
        return kept[0], kept[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastResult:
    """A contrast, its effect and the verdict.

    Attributes:
        contrast: What was compared.
        verdict: What the data say, after adjustment where the contrast is primary.
        reason: Why there is no verdict, or what to know about the one there is.
        effect: Ratio of geometric means, or difference of means; NaN without pairs.
        interval: 95 % t-interval of the effect, not adjusted.
        interval_90: 90 % t-interval of the effect, not adjusted.
        adjusted_interval: t-interval at level ``1 - 0.05/num_tests``: the verdicts
            *larger* and *smaller* say that it lies beyond the margin.
        p_beyond: p-value of the claim that the effect is beyond the margin; NaN where
            nothing was tested.
        p_inside: p-value of the claim that it is inside the margin; NaN likewise.
        num_pairs: Pairs that entered.
        num_missing: Pairs of which a side is missing.
        num_tests: Contrasts that the verdict is adjusted for; 1 if descriptive.
    """

    contrast: Contrast
    verdict: Verdict
    reason: str
    effect: float
    interval: Interval
    interval_90: Interval
    adjusted_interval: Interval
    p_beyond: float
    p_inside: float
    num_pairs: int
    num_missing: int
    num_tests: int

    @property
    def p_value(self) -> float:
        """Unadjusted p-value of the claim, beyond or inside, that is nearer at hand."""
        return min(self.p_beyond, self.p_inside)

    @property
    def p_adjusted(self) -> float:
        """``p_value`` adjusted for the family; as it is for a descriptive contrast."""
        adjusted = self.num_tests * self.p_value
        return 1.0 if adjusted > 1.0 else adjusted  # NaN stays NaN

    @property
    def decided(self) -> bool:
        """Whether the verdict is larger, smaller or equivalent."""
        return self.verdict in (Verdict.LARGER, Verdict.SMALLER, Verdict.EQUIVALENT)

    def describe(self) -> str:
        """Return one plain sentence with the effect, its interval and the verdict."""
        contrast = self.contrast
        known = QUANTITIES.get(contrast.quantity)
        label = known.label if known else contrast.quantity
        head = f"{label} at {contrast.snapshot}, {contrast.treatment}"
        if math.isnan(self.effect):
            return f"{head} against {contrast.reference}: {self._verdict_words()}."
        if contrast.scale == "ratio":
            size = f"is {_number(self.effect)} times that of {contrast.reference}"
        else:
            size = f"minus {contrast.reference} is {self._amount(self.effect)}"
        interval = f"95 % interval {self._interval_words()}, {self.num_pairs} pairs"
        return f"{head} {size} ({interval}): {self._verdict_words()}."

    def _amount(self, value: float) -> str:
        known = QUANTITIES.get(self.contrast.quantity)
        unit = known.unit if known else ""
        if unit == "fraction":
            return f"{_number(100.0 * value)} percentage points"
        return f"{_number(value)} {unit}".rstrip()

    def _interval_words(self) -> str:
        if not self.interval.bounded:
            return "unbounded"
        low, high = self.interval.low, self.interval.high
        if self.contrast.scale == "ratio":
            return f"{_number(low)} to {_number(high)}"
        known = QUANTITIES.get(self.contrast.quantity)
        factor = 100.0 if known and known.unit == "fraction" else 1.0
        return f"{_number(factor * low)} to {_number(factor * high)}"

    def _verdict_words(self) -> str:
        if not self.decided:
            return f"{self.verdict}, {self.reason}" if self.reason else self.verdict
        margin = self.contrast.margin
        if self.contrast.scale == "ratio":
            size = f"a factor of {_number(margin)}"
        else:
            size = self._amount(margin)
        relation = "within" if self.verdict is Verdict.EQUIVALENT else "by more than"
        words = f"{self.verdict} {relation} {size}"
        if not self.contrast.primary:
            words += " (descriptive, not adjusted)"
        elif self.num_tests > 1:
            words += f" (adjusted for {self.num_tests} primary contrasts)"
        return f"{words}; {self.reason}" if self.reason else words


def _number(value: float) -> str:
    return f"{value:.3g}"
