"""The numbers behind a claim: one per seed, or one per seed of two groups."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate
from noisekit.stats.permutation import SimultaneousBand


@dataclass(frozen=True, slots=True)
class SeedSample:
    """One number per seed, or one of each of two groups; NaN where a run gave none.

    Attributes:
        seeds: Each once.
        treatment: The statistic of the treatment per seed, NaN where missing.
        reference: The same of the reference; ``None`` where ``treatment`` is compared
            with a number.
        not_comparable: Why no verdict may be given, where a fair-test rule is broken.
        crossed: The same difference with its error over seeds and test images, where
            it is one of error rates; the wider of the two intervals decides.
        band: The gap between two curves with its simultaneous band, which then decides.
        note: What the statistic chose or left out, in words.

    Raises:
        UsageError: If lengths differ or a seed occurs twice.
    """

    seeds: tuple[int, ...]
    treatment: tuple[float, ...]
    reference: tuple[float, ...] | None = None
    not_comparable: str | None = None
    crossed: Estimate | None = None
    band: SimultaneousBand | None = None
    note: str = ""

    def __post_init__(self) -> None:
        sides = [self.treatment] + ([self.reference] if self.reference else [])
        if any(len(side) != len(self.seeds) for side in sides):
            below = "no" if self.reference is None else len(self.reference)
            raise UsageError(
                "a sample needs one value per seed of each group, got "
                f"{len(self.seeds)} seeds, {len(self.treatment)} treatment and "
                f"{below} reference values; write NaN for a missing one."
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"a sample needs each seed once, got {list(self.seeds)}.")

    @classmethod
    def by_seed(
        cls,
        treatment: Mapping[int, float],
        reference: Mapping[int, float] | None = None,
        *,
        seeds: Sequence[int] = (),
        not_comparable: str | None = None,
        crossed: Estimate | None = None,
        band: SimultaneousBand | None = None,
        note: str = "",
    ) -> "SeedSample":
        """Pair two groups by seed; what is in only one of them counts as missing.

        Args:
            treatment: Value by seed.
            reference: Value by seed, where there is a second group.
            seeds: Seeds that were planned, so that one which is in neither group still
                counts as missing.
            not_comparable: Why no verdict may be given, if so.
            crossed: The difference with its error over seeds and test images.
            band: The gap between two curves.
            note: What the statistic chose or left out.
        """
        every = tuple(sorted({*seeds, *treatment, *(reference or ())}))
        below = None
        if reference is not None:
            below = tuple(float(reference.get(s, math.nan)) for s in every)
        return cls(
            seeds=every,
            treatment=tuple(float(treatment.get(s, math.nan)) for s in every),
            reference=below,
            not_comparable=not_comparable,
            crossed=crossed,
            band=band,
            note=note,
        )

    def at_seeds(self, seeds: Iterable[int]) -> Self:
        """Return the sample at the planned seeds; an absent one is missing."""
        planned = tuple(sorted(set(seeds)))
        above = dict(zip(self.seeds, self.treatment, strict=True))
        below = None
        if self.reference is not None:
            there = dict(zip(self.seeds, self.reference, strict=True))
            below = tuple(there.get(seed, math.nan) for seed in planned)
        return replace(
            self,
            seeds=planned,
            treatment=tuple(above.get(seed, math.nan) for seed in planned),
            reference=below,
        )

    def complete(
        self, *, no_effect: float = 0.0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the values of the seeds that have all of theirs.

        Args:
            no_effect: What takes the place of a reference where there is none.
        """
        below = self.reference
        if below is None:
            below = (no_effect,) * len(self.seeds)
        both = np.array([self.treatment, below], dtype=np.float64)  # (2, n)
        kept = both[:, np.isfinite(both).all(axis=0)]
        return kept[0], kept[1]
