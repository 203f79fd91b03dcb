"""Contrasts stated before the runs, their data by seed, and their results."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate, Interval
from noisekit.core.vocabulary import QUANTITIES
from noisekit.stats.effects import Scale, margin_fault


class Verdict(StrEnum):
    """Where the interval of a contrast lies, against no effect and the margin."""

    LARGER = "larger"
    """Beyond the margin, on the upper side."""
    SMALLER = "smaller"
    """Beyond the margin, on the lower side."""
    LARGER_WITHIN_MARGIN = "larger within the margin"
    """Above no effect, and inside the margin."""
    SMALLER_WITHIN_MARGIN = "smaller within the margin"
    """Below no effect, and inside the margin."""
    EQUIVALENT = "equivalent"
    """Inside the margin, with no effect inside the interval."""
    NOT_RESOLVED = "not resolved"
    """Across the margin; the seeds do not suffice."""
    NOT_COMPARABLE = "not comparable"
    """A fair-test rule is broken, such as unmatched training loss."""
    NOT_JUDGED = "not judged"
    """The runs make no claims, such as a smoke run."""

    @property
    def decided(self) -> bool:
        """Whether the data decided on which side of the margin the effect lies."""
        return self not in _UNDECIDED

    @property
    def region(self) -> int:
        """1 above the margin, 0 inside it, -1 below; only where ``decided``."""
        return {Verdict.LARGER: 1, Verdict.SMALLER: -1}.get(self, 0)

    @property
    def direction(self) -> int:
        """1 for a larger value, -1 for a smaller one, 0 where none is established."""
        return _DIRECTIONS.get(self, 0)


_UNDECIDED = (Verdict.NOT_RESOLVED, Verdict.NOT_COMPARABLE, Verdict.NOT_JUDGED)
_DIRECTIONS = {
    Verdict.LARGER: 1,
    Verdict.LARGER_WITHIN_MARGIN: 1,
    Verdict.SMALLER: -1,
    Verdict.SMALLER_WITHIN_MARGIN: -1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """One comparison of two arms, fixed before any run.

    Attributes:
        name: Unique within the recipe.
        quantity: Name in the vocabulary.
        treatment: Arm whose value is on top of the ratio, or first in the difference;
            or a group of arms, see ``arms_named``.
        reference: Arm, or group of arms, that it is compared with.
        snapshot: Where in training both are measured.
        scale: Ratio of geometric means, or difference of means.
        margin: Smallest effect that matters; above 1 for a ratio, above 0 and in the
            quantity's unit for a difference.
        primary: Whether it belongs to the family that is adjusted for its size;
            any other is descriptive.
        paper: A paper's own finding, in words; shown beside the result, not tested.
        description: What the contrast holds equal; its name wherever it is shown.

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

    @property
    def null(self) -> float:
        """The value of no effect."""
        return 1.0 if self.scale == "ratio" else 0.0

    @property
    def margin_ends(self) -> tuple[float, float]:
        """Lowest and highest effect that are too small to matter."""
        lowest = 1.0 / self.margin if self.scale == "ratio" else -self.margin
        return lowest, self.margin


def arms_named(name: str, arms: Iterable[str]) -> tuple[str, ...]:
    """Return the arms that a contrast means: one of that name, or a group.

    Arms of a grid are named by their factors, as in ``fork/order=1/batch_size=16``.
    A name that leaves factors out means all arms that have the parts it states, in
    any order: ``fork/batch_size=16`` is the group of all such forks.

    Example:
        >>> arms_named("fork/b=16", ["trunk", "fork/k=1/b=16", "fork/k=2/b=16"])
        ('fork/k=1/b=16', 'fork/k=2/b=16')
    """
    known = tuple(arms)
    if name in known:
        return (name,)
    parts = set(name.split("/"))
    return tuple(arm for arm in known if parts <= set(arm.split("/")))


def contrast_titles(contrasts: Sequence[Contrast]) -> dict[str, str]:
    """Return the name under which each contrast is shown, by its name in the recipe.

    The recipe's description; with the quantity in front where two contrasts share it.
    """
    titles = {c.name: c.description or c.name.replace("_", " ") for c in contrasts}
    shared = [title for title, times in Counter(titles.values()).items() if times > 1]
    for contrast in contrasts:
        title = titles[contrast.name]
        if title in shared:
            known = QUANTITIES.get(contrast.quantity)
            label = known.label if known else contrast.quantity.replace("_", " ")
            titles[contrast.name] = f"{label}: {title}"
    return {name: title[:1].upper() + title[1:] for name, title in titles.items()}


@dataclass(frozen=True, slots=True)
class PairedSample:
    """Both arms' values by seed; NaN where a run gave none.

    Attributes:
        seeds: One per pair, each once.
        treatment: Value of the treatment arm per seed, NaN where missing.
        reference: Value of the reference arm per seed, NaN where missing.
        not_comparable: Why no verdict may be given, where a fair-test rule is broken.
        crossed: The same difference with its error over seeds and test images, where
            it is one of error rates; the wider of the two intervals decides.

    Raises:
        UsageError: If lengths differ or a seed occurs twice.
    """

    seeds: tuple[int, ...]
    treatment: tuple[float, ...]
    reference: tuple[float, ...]
    not_comparable: str | None = None
    crossed: Estimate | None = None

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
        crossed: Estimate | None = None,
    ) -> "PairedSample":
        """Pair two arms by seed; what is in only one of them counts as missing.

        Args:
            treatment: Value by seed.
            reference: Value by seed.
            seeds: Seeds that were planned, so that one which is in neither arm still
                counts as missing.
            not_comparable: Why no verdict may be given, if so.
            crossed: The difference with its error over seeds and test images.
        """
        every = tuple(sorted({*seeds, *treatment, *reference}))
        return cls(
            seeds=every,
            treatment=tuple(float(treatment.get(s, math.nan)) for s in every),
            reference=tuple(float(reference.get(s, math.nan)) for s in every),
            not_comparable=not_comparable,
            crossed=crossed,
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
        verdict: Where ``interval`` lies.
        reason: Why there is no verdict, or what to know about the one there is.
        effect: Ratio of geometric means, or difference of means; NaN without pairs.
        interval: The interval that decides: at level ``1 - 0.05/num_tests``, or
            ``1 - 0.1/num_tests`` where only that one lies inside the margin.
        p_value: Of no effect, times ``num_tests``; at most 0.05 where a direction is
            established. NaN where nothing was tested.
        error_over: What the interval averages over.
        num_pairs: Pairs that entered.
        num_missing: Pairs of which a side is missing.
        num_tests: Contrasts that the interval is adjusted for; 1 if descriptive.
    """

    contrast: Contrast
    verdict: Verdict
    reason: str
    effect: float
    interval: Interval
    p_value: float
    error_over: Literal["seeds", "seeds and images"] = "seeds"
    num_pairs: int
    num_missing: int
    num_tests: int
