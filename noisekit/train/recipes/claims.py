"""Claims of a recipe, stated before the runs, and what they need of its arms."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from noisekit.core.errors import UsageError
from noisekit.core.references import is_reference
from noisekit.core.vocabulary import QUANTITIES
from noisekit.stats.claims import Account, Claim, Expected, Kind, claim_of, contrast
from noisekit.stats.effects import Scale
from noisekit.stats.statistics import Own, arms_named
from noisekit.train.recipes.design import ArmSpec
from noisekit.train.recipes.measure_spec import ALWAYS_RECORDED
from noisekit.train.recipes.parsing import ParsedSections
from noisekit.train.recipes.recipe_errors import Fault, not_one_of
from noisekit.train.recipes.run_spec import RunSections
from noisekit.train.recipes.tables import short_names
from noisekit.train.section import Name, PositiveFloat, Section

_PLACES = ("step", "examples_seen", "epoch", "learning_rate")
"""What a snapshot has beside losses, errors and norms."""
_CASE = {"at": "snapshot"}
"""Keys of a contrast that a statistic calls otherwise."""
_GROUPS = ("treatment", "reference", "other_treatment", "other_reference")


class ClaimSpec(Section):
    """A claim that is stated before the runs; see ``stats.Claim``."""

    name: Name
    statistic: dict[str, JsonValue]
    margin: PositiveFloat
    null: Annotated[float | None, Field(allow_inf_nan=False)] = None
    scale: Scale = "difference"
    kind: Kind = "claim"
    primary: bool = False
    expect: Expected = ""
    paper: str = ""
    account: Account = ""
    description: str = ""

    @model_validator(mode="after")
    def _can_be_judged(self) -> Self:
        try:
            self.claim()
        except UsageError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    def claim(self) -> Claim:
        """Return the claim as the statistics take it."""
        return claim_of(self.model_dump())


class ContrastSpec(Section):
    """The shorthand for a claim that compares two arms at one snapshot."""

    name: Name
    quantity: str
    treatment: str
    reference: str
    snapshot: str
    scale: Literal["ratio", "difference"]
    margin: PositiveFloat
    primary: bool = False
    paper: str = ""
    description: str = ""

    @model_validator(mode="after")
    def _margin_fits_the_scale(self) -> Self:
        if self.scale == "ratio" and self.margin <= 1:
            raise ValueError(
                f"margin of a ratio is a factor above 1, such as 1.5; got {self.margin}"
            )
        fraction = self.quantity.endswith("_error")
        if self.scale == "difference" and fraction and self.margin >= 1:
            raise ValueError(
                f"margin of a difference of {self.quantity} is a fraction below 1, "
                f"such as 0.005 for half a point; got {self.margin}"
            )
        return self

    def claim(self) -> Claim:
        """Return the claim that it is short for."""
        return contrast(**self.model_dump())


def claim_faults(
    claims: Sequence[ClaimSpec],
    contrasts: Sequence[ContrastSpec],
    arms: Mapping[str, ParsedSections],
    specs: Sequence[ArmSpec],
) -> Iterator[Fault]:
    """Yield each name in a claim that the recipe, or an arm, does not have."""
    of_claims = [spec.name for spec in claims]
    names = Counter([*of_claims, *(spec.name for spec in contrasts)])
    for name, times in names.items():
        if times > 1:
            kind = "claim" if name in of_claims else "contrast"
            yield Fault(
                f"{kind}s", f"needs a name per {kind}, got {name!r} {times} times"
            )
    if not names:
        return
    factors = _factors(arms, specs)
    stated: tuple[ClaimSpec | ContrastSpec, ...] = (*contrasts, *claims)
    for spec in stated:
        short = isinstance(spec, ContrastSpec)
        if isinstance(spec, ContrastSpec) and spec.treatment == spec.reference:
            text = f"needs another arm than the treatment, {spec.treatment!r}"
            yield Fault(f"contrasts.{spec.name}.reference", text)
            continue
        for key, text in dict.fromkeys(_faults_of(spec.claim(), arms, factors)):
            place = f"contrasts.{spec.name}" if short else f"claims.{spec.name}"
            key = _CASE.get(key, key) if short else f"statistic.{key}"
            yield Fault(f"{place}.{key}", text)


def _factors(
    arms: Mapping[str, ParsedSections], specs: Sequence[ArmSpec]
) -> dict[str, dict[str, object]]:
    """Return the factors of each arm, by short name."""
    names = short_names(dict.fromkeys(key for arm in specs for key in arm.set))
    return {
        arm: {short: _setting(sections, key) for key, short in names.items()}
        for arm, sections in arms.items()
    }


def _setting(sections: ParsedSections, key: str) -> object:
    first, *rest = key.split(".")
    value: object = sections.values.get(first)
    for part in rest:
        value = (
            value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        )
    return list(value) if isinstance(value, tuple) else value


def _faults_of(
    claim: Claim,
    arms: Mapping[str, ParsedSections],
    factors: Mapping[str, Mapping[str, object]],
) -> Iterator[tuple[str, str]]:
    statistic = claim.statistic
    known = list(dict.fromkeys(name for arm in factors.values() for name in arm))
    for name in statistic.factors:
        if name not in known:
            yield "over", not_one_of("a factor that the arms set", name, known)
    for role in _GROUPS:
        group = getattr(statistic, role, None)
        if group is None:
            continue
        found = arms_named(group, factors)
        if not found:
            yield role, not_one_of("an arm", group, arms)
        for arm in found:
            if arms[arm].having(("snapshots", "measure", "training")):
                yield from _faults_in_arm(claim, arms[arm].assembled())


def _faults_in_arm(claim: Claim, arm: RunSections) -> Iterator[tuple[str, str]]:
    statistic = claim.statistic
    snapshot = statistic.snapshot
    if snapshot is None:
        for quantity in statistic.quantities:
            if quantity not in QUANTITIES and not isinstance(statistic, Own):
                yield "quantity", not_one_of("a quantity", quantity, QUANTITIES)
        return
    if snapshot not in arm.snapshot_names:
        yield "at", not_one_of("a snapshot", snapshot, arm.snapshot_names)
        return
    measured = arm.measure.measures_at(snapshot)
    own = any(map(is_reference, measured))
    of_forks = () if arm.start is None else ("distance_from_fork",)
    there = (*ALWAYS_RECORDED, *of_forks, *measured)
    for quantity in statistic.quantities:
        if quantity in there or quantity in _PLACES or own:
            continue
        if quantity not in QUANTITIES:
            yield "quantity", not_one_of("a quantity", quantity, there)
        else:
            yield (
                "quantity",
                f"{quantity!r} is not measured at {snapshot!r}; add it to "
                f"measure.at.{snapshot} or to measure.everywhere",
            )
