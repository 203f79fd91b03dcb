"""Claims stated before the runs, their data by seed, and their results."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, get_args

from noisekit.core.errors import UsageError
from noisekit.core.results import Interval
from noisekit.core.settings import check_settings
from noisekit.core.vocabulary import QUANTITIES
from noisekit.stats.effects import NO_EFFECT, Scale, margin_fault
from noisekit.stats.statistics import Difference, Ratio, Statistic, statistic_of
from noisekit.stats.statistics.tables import ALL


class Verdict(StrEnum):
    """Where the interval of a claim lies, against its null and the margin."""

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
    """The runs carry no verdicts, such as a smoke run."""
    PASSED = "passed"
    """An identity or a control that came out as it must."""
    FAILED = "failed"
    """The instrument is broken, as an identity or a control that failed shows."""

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


_UNDECIDED = (
    Verdict.NOT_RESOLVED,
    Verdict.NOT_COMPARABLE,
    Verdict.NOT_JUDGED,
    Verdict.PASSED,
    Verdict.FAILED,
)
_DIRECTIONS = {
    Verdict.LARGER: 1,
    Verdict.LARGER_WITHIN_MARGIN: 1,
    Verdict.SMALLER: -1,
    Verdict.SMALLER_WITHIN_MARGIN: -1,
}


Kind = Literal["claim", "identity", "control"]
"""A claim may be judged. An identity checks the instrument against theory, a control
against an answer that was planted; both pass or fail, and belong to no family."""

Expected = Literal["", "larger", "smaller", "equivalent"]
"""What the paper found; empty where it is silent."""

Account = Literal[
    "",
    "sharp_minima",
    "rate_per_example",
    "number_of_updates",
    "weight_scale",
    "edge_of_stability",
]
"""An account of why batch size matters, by name."""

ACCOUNTS: Mapping[str, str] = MappingProxyType(
    {
        "sharp_minima": "Large batches end in sharper minima, which generalize worse.",
        "rate_per_example": "What counts is the ratio of learning rate to batch size.",
        "number_of_updates": "At equal epochs, large batches take too few updates.",
        "weight_scale": "Sharpness and distance reflect the scale of the weights.",
        "edge_of_stability": "Learning rate and batch size limit the curvature.",
    }
)
"""Accounts of why batch size matters, each in a sentence; no verdict is about one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statistic of each seed's runs against one number, fixed before any run.

    Attributes:
        name: Unique within the recipe.
        statistic: What maps the runs of one seed to one number.
        margin: Smallest deviation from ``null`` that matters: above 1 for a ratio,
            above 0 and in the statistic's unit for a difference.
        scale: Whether the statistic is judged as a factor, on its logarithm, or as a
            difference.
        null: The value of no effect; by default 1 for a ratio, 0 for a difference.
        kind: Whether it may be judged, or checks the instrument.
        primary: Whether it belongs to the family that is adjusted for its size;
            any other is descriptive.
        expect: The paper's own direction; for a control, the answer that was planted.
            Decides nothing about a claim.
        paper: The paper's own finding, in words; shown beside the result, not tested.
        account: The account of why batch size matters that the claim bears on.
        description: What the claim holds equal; its name wherever it is shown.

    Raises:
        UsageError: If null, margin, kind, scale or statistic do not fit each other.

    Example:
        >>> Claim(
        ...     name="large_batch_errs_more",
        ...     statistic=Difference(
        ...         quantity="test_error", treatment="large", reference="small"
        ...     ),
        ...     margin=0.005,
        ...     primary=True,
        ... ).margin_ends
        (-0.005, 0.005)
    """

    name: str
    statistic: Statistic
    margin: float
    scale: Scale = "difference"
    null: float = math.nan
    kind: Kind = "claim"
    primary: bool = False
    expect: Expected = ""
    paper: str = ""
    account: Account = ""
    description: str = ""

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise UsageError(
                f"claim {self.name!r} needs scale 'ratio' or 'difference', got "
                f"{self.scale!r}."
            )
        try:
            check_settings(self)
        except UsageError as error:
            raise UsageError(f"claim {self.name!r}: {error}") from error
        if math.isnan(self.null):
            object.__setattr__(self, "null", NO_EFFECT[self.scale])
        fault = claim_fault(self)
        if fault:
            raise UsageError(f"claim {self.name!r} {fault}")

    @property
    def quantity(self) -> str:
        """Name of the statistic's quantity in the vocabulary."""
        return self.statistic.quantity

    @property
    def compares(self) -> bool:
        """Whether two groups of runs are compared, so that seeds make pairs."""
        return self.statistic.reference is not None

    @property
    def margin_ends(self) -> tuple[float, float]:
        """Lowest and highest value that deviate too little from null to matter."""
        if self.scale == "ratio":
            return self.null / self.margin, self.null * self.margin
        return self.null - self.margin, self.null + self.margin


def claim_fault(claim: Claim) -> str:
    """Return what does not fit within a claim, or nothing."""
    statistic = claim.statistic
    required = statistic.scale
    if required is not None and claim.scale != required:
        return (
            f"needs scale {required!r} for the statistic {statistic.name!r}, got "
            f"{claim.scale!r}."
        )
    if claim.primary and claim.kind != "claim":
        return (
            f"needs primary = false, since a claim of kind {claim.kind!r} passes or "
            "fails and belongs to no family."
        )
    if claim.scale == "ratio" and not (0.0 < claim.null < math.inf):
        return f"needs a finite null above 0 for a ratio, got {claim.null:g}."
    if not math.isfinite(claim.null):
        return f"needs a finite null, got {claim.null:g}."
    return statistic.fault() or margin_fault(claim.margin, scale=claim.scale)


def contrast(
    *,
    name: str,
    quantity: str,
    treatment: str,
    reference: str,
    snapshot: str,
    scale: Scale,
    margin: float,
    primary: bool = False,
    paper: str = "",
    description: str = "",
) -> Claim:
    """Return the claim that compares two arms at one snapshot: ``[[contrasts]]``.

    The shorthand for the statistics ``difference`` and ``ratio``.

    Args:
        name: Unique within the recipe.
        quantity: Name in the vocabulary.
        treatment: Arm whose value is on top of the ratio, or first in the difference;
            or a group of arms that are replicates, see ``arms_named``.
        reference: Arm, or group, that it is compared with.
        snapshot: Where in training both are measured.
        scale: Ratio of geometric means, or difference of means.
        margin: Smallest effect that matters.
        primary: Whether it belongs to the family that is adjusted for its size.
        paper: A paper's own finding, in words.
        description: What the contrast holds equal.

    Raises:
        UsageError: If the arms are the same, or scale or margin do not fit.
    """
    kind = {"ratio": Ratio, "difference": Difference}.get(scale, Difference)
    return Claim(
        name=name,
        statistic=kind(
            quantity=quantity,
            treatment=treatment,
            reference=reference,
            at=snapshot,
            over=ALL,
        ),
        scale=scale,
        margin=margin,
        primary=primary,
        paper=paper,
        description=description,
    )


def claim_of(table: Mapping[str, Any]) -> Claim:
    """Return the claim that a recipe's table describes: ``[[claims]]``.

    Args:
        table: The fields of :class:`Claim`, with ``statistic`` a table of its own.

    Raises:
        UsageError: If a field of the claim or of its statistic does not fit.

    Example:
        >>> claim_of(
        ...     {
        ...         "name": "plateau",
        ...         "statistic": {"name": "tail_mean", "quantity": "train_loss"},
        ...         "margin": 0.1,
        ...     }
        ... ).null
        0.0
    """
    settings = {key: value for key, value in table.items() if value is not None}
    statistic = statistic_of(settings.pop("statistic", {}))
    return Claim(statistic=statistic, **settings)


def claim_titles(claims: Sequence[Claim]) -> dict[str, str]:
    """Return the name under which each claim is shown, by its name in the recipe.

    The recipe's description; with the quantity in front where two claims share it.
    """
    titles = {c.name: c.description or c.name.replace("_", " ") for c in claims}
    shared = [title for title, times in Counter(titles.values()).items() if times > 1]
    for claim in claims:
        title = titles[claim.name]
        if title in shared:
            known = QUANTITIES.get(claim.quantity)
            label = known.label if known else claim.quantity.replace("_", " ")
            titles[claim.name] = f"{label}: {title}"
    return {name: title[:1].upper() + title[1:] for name, title in titles.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimResult:
    """A claim, its estimate and the verdict.

    Attributes:
        claim: What was claimed.
        verdict: Where ``interval`` lies.
        reason: Why there is no verdict, or what to know about the one there is.
        effect: Mean of the statistic over seeds, geometric for a ratio; NaN without.
        interval: The interval that decides: at level ``1 - 0.05/num_tests``, or
            ``1 - 0.1/num_tests`` where only that one lies inside the margin.
        p_value: Of the null, times ``num_tests``; at most 0.05 where a direction is
            established. NaN where nothing was tested.
        error_over: What the interval averages over.
        num_pairs: Seeds that entered.
        num_missing: Seeds without a number.
        num_tests: Claims that the interval is adjusted for; 1 if descriptive.
        note: What the statistic chose or left out, in words.
    """

    claim: Claim
    verdict: Verdict
    reason: str
    effect: float
    interval: Interval
    p_value: float
    error_over: Literal["seeds", "seeds and images"] = "seeds"
    num_pairs: int
    num_missing: int
    num_tests: int
    note: str = ""

    @property
    def against_paper(self) -> str:
        """How the verdict compares with what the paper found; empty if it cannot."""
        expected = self.claim.expect
        if not expected or not self.verdict.decided:
            return ""
        wanted = {"larger": 1, "smaller": -1, "equivalent": 0}[expected]
        if self.verdict.region == wanted:
            return "as the paper"
        if self.verdict.region == 0 and self.verdict.direction == wanted:
            return "in the paper's direction, within the margin"
        return "against the paper"
