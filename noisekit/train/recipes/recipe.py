"""A recipe: one experiment, complete and checked, and its description of each run."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, PrivateAttr

from noisekit.core.errors import RecipeError, UsageError
from noisekit.core.references import is_reference
from noisekit.stats.claims import Claim
from noisekit.stats.statistics import arms_named
from noisekit.train.recipes.claims import ClaimSpec, ContrastSpec, claim_faults
from noisekit.train.recipes.consistency import (
    analysis_faults,
    arm_faults,
    section_faults,
)
from noisekit.train.recipes.design import ArmSpec, RulesSpec, SeedsSpec
from noisekit.train.recipes.format1 import translated_recipe
from noisekit.train.recipes.parsing import (
    RUN_SECTIONS,
    ParsedSections,
    PartParser,
    arm_table,
    parse_part,
    parse_sections,
)
from noisekit.train.recipes.recipe_errors import Fault, not_one_of, unknown_keys
from noisekit.train.recipes.run_spec import RunSections, RunSpec
from noisekit.train.recipes.starts import (
    kept_optimizers,
    origins,
    start_faults,
    with_seeds_of_origins,
)
from noisekit.train.recipes.tables import Table, overlap, short_names, stated
from noisekit.train.section import Name, run_id_of


class Recipe(RunSections):
    """One experiment, complete and checked.

    Attributes:
        format: Version of the recipe's shape.
        name: Name of the experiment.
        question: What it asks, in one sentence.
        source: The papers, or what else it rests on.
        title: What this profile is.
        cost: What this profile costs, in words.
        verdicts: Whether its runs may carry verdicts.
        profile: Name of the profile; empty where none was chosen.
        seeds: Seeds of every arm.
        arms: What is compared.
        claims: What is claimed about the arms, with margins.
        contrasts: The same, in the shorthand for two arms at one snapshot.
        analyses: Names of the analyses that answer the question.
        rules: What makes the comparison fair.
    """

    format: Literal[2] = 2
    name: Name
    question: str
    source: str = ""
    title: str = ""
    cost: str = ""
    verdicts: bool = True
    profile: str = ""
    seeds: SeedsSpec
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=1)]
    claims: tuple[ClaimSpec, ...] = ()
    contrasts: tuple[ContrastSpec, ...] = ()
    analyses: tuple[str, ...] = ()
    rules: RulesSpec = RulesSpec()

    _runs_of_arms: tuple[RunSections, ...] = PrivateAttr(default=())

    def to_json(self) -> str:
        """Return the recipe as JSON; ``from_json`` gives an equal one back."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the recipe that ``to_json`` wrote."""
        return cls.from_table(json.loads(text))

    @classmethod
    def from_table(cls, table: Mapping[str, JsonValue]) -> Self:
        """Return a recipe as it was recorded, in this format or an older one.

        Raises:
            RecipeError: With all faults.
        """
        recipe, faults = cls.checked(translated_recipe(table))
        if recipe is None:
            raise RecipeError("\n".join(map(str, faults)))
        return recipe

    @classmethod
    def checked(cls, table: Table) -> tuple[Self | None, list[Fault]]:
        """Parse and check a recipe, each part once.

        Returns:
            The recipe, if it has no faults; and all faults.
        """
        check = _Check(table)
        faults = check.faults()
        if faults:
            return None, faults
        runs = {name: arm.assembled() for name, arm in check.arms.items()}
        arms = with_seeds_of_origins(
            check.values["arms"], origins(runs), check.values["seeds"]
        )
        recipe = cls.model_construct(**{**check.values, "arms": arms})
        recipe._runs_of_arms = tuple(runs.values())
        return recipe, []

    def stated_claims(self) -> tuple[Claim, ...]:
        """Return all claims as the statistics take them, contrasts first."""
        short = tuple(spec.claim() for spec in self.contrasts)
        return short + tuple(spec.claim() for spec in self.claims)

    def num_seeds(self, claim: Claim) -> int:
        """Return at how many seeds a claim is to have all the runs that it needs."""
        seeds = {arm.name: set(self.seeds.of_arm(arm.seeds)) for arm in self.arms}
        factors = {spec.arm: spec.factors for spec in self.run_specs()}
        groups = [group for group in claim.statistic.groups if group is not None]
        arms = [arm for group in groups for arm in arms_named(group, factors)]
        return len(set.intersection(*(seeds[arm] for arm in arms)))

    @property
    def named_code(self) -> tuple[str, ...]:
        """Code of the user's own that running imports, as ``module:function``."""
        named = [name for run in self._runs_of_arms for name in run.named_code]
        named += [name for name in self.analyses if is_reference(name)]
        kinds = [str(spec.statistic.get("name", "")) for spec in self.claims]
        named += [name for name in kinds if is_reference(name)]
        return tuple(dict.fromkeys(named))

    def adjusted(self, *, device: str | None = None, seeds: int | None = None) -> Self:
        """Return the recipe for another device or number of seeds, as far as given.

        Another number of seeds than the recipe's file states is put on record beside
        it, since results that were looked at may have led to it.

        Raises:
            UsageError: If there is no such device in PyTorch, or no seed is left.
        """
        if device is None and seeds is None:
            return self
        table: dict[str, Any] = self.model_dump(mode="json")
        if device is not None:
            table["compute"]["device"] = device
        if seeds is not None:
            planned = self.seeds.planned or self.seeds.count
            table["seeds"]["count"] = seeds
            table["seeds"]["planned"] = None if planned == seeds else planned
        recipe, faults = self.checked(table)
        if recipe is None:
            listed = "; ".join(map(str, faults))
            raise UsageError(f"{listed}, for this run of {self.name}.")
        return recipe

    def run_specs(self) -> list[RunSpec]:
        """Return every arm at each of its seeds, grouped by seed."""
        by_arm = {arm.name: self.seeds.of_arm(arm.seeds) for arm in self.arms}
        seeds = sorted({seed for own in by_arm.values() for seed in own})
        names = short_names(dict.fromkeys(key for arm in self.arms for key in arm.set))
        runs = dict(zip(by_arm, self._runs_of_arms, strict=True))
        kept = kept_optimizers(runs)
        factors = {
            arm: {name: stated(table, key) for key, name in names.items()}
            for arm, run in runs.items()
            if (table := run.model_dump(mode="json"))
        }
        return [
            RunSpec.model_construct(
                recipe=self.name,
                run_id=run_id_of(arm, seed),
                arm=arm,
                seed=seed,
                factors=factors[arm],
                kept_optimizers=kept.get(arm, ()),
                **dict(self._with_split(run, seed)),
            )
            for seed in seeds
            for arm, run in runs.items()
            if seed in by_arm[arm]
        ]

    def _with_split(self, run: RunSections, seed: int) -> RunSections:
        """Return the sections of a run, with its own split where each seed has one."""
        return run if self.seeds.split == "shared" else run.with_own_split(seed)


_RECIPE = PartParser(Recipe)
_ITEMS = {"arms": ArmSpec, "claims": ClaimSpec, "contrasts": ContrastSpec}


class _Check:
    """Parses each part of a recipe once, then checks the parts against each other.

    Attributes:
        values: Fields of the recipe.
        base: Its sections.
        arms: Sections of each arm.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._sections = {key: table[key] for key in RUN_SECTIONS if key in table}
        self._sections = arm_table(self._sections, self._common_settings())
        self._faults = unknown_keys(table, Recipe.model_fields)
        self.base = parse_sections(self._sections)
        self._faults += self.base.faults
        self.values: dict[str, Any] = dict(self.base.values)
        for key in Recipe.model_fields.keys() - RUN_SECTIONS:
            self.values[key] = self._parsed(key)
        self.arms = {
            arm.name: parse_sections(arm_table(self._sections, self._settings(arm)))
            for arm in self.values["arms"]
        }

    def faults(self) -> list[Fault]:
        """Return all faults, each once."""
        found = [*self._faults, *section_faults(self.base)]
        known = {str(fault) for fault in found}
        for arm in self.values["arms"]:
            found += self._faults_of_arm(arm, known)
        specs = self.values["arms"]
        found += arm_faults([arm.name for arm in specs])
        found += start_faults(specs, self.arms, self.values["seeds"])
        stated_claims = (self.values["claims"], self.values["contrasts"])
        found += claim_faults(*stated_claims, self.arms, specs)
        found += analysis_faults(self.values["analyses"] or ())
        return found

    def _parsed(self, key: str) -> Any:
        value = self._table.get(key)
        if key == "claims" and isinstance(value, bool):
            text = f"is the list of claims, got {str(value).lower()}"
            self._faults.append(Fault(key, f"{text}; write verdicts for it"))
            return ()
        if key not in _ITEMS or not isinstance(value, list) or not value:
            part = _RECIPE.parse(key, self._table)
            self._faults += part.faults
            return () if key in _ITEMS and part.value is None else part.value
        items = []
        for number, item in enumerate(value, start=1):
            part = parse_part(_ITEMS[key], item, prefix=f"{key}[{number}]")
            self._faults += part.faults
            items += [] if part.value is None or part.faults else [part.value]
        return tuple(items)

    def _settings(self, arm: ArmSpec) -> Table:
        return {k: v for k, v in arm.set.items() if k.split(".")[0] in RUN_SECTIONS}

    def _common_settings(self) -> Table:
        """Return what all arms set, which the recipe need not state; the first's."""
        arms = self._table.get("arms")
        stated_by_arms = [
            arm.get("set") if isinstance(arm, dict) else None
            for arm in (arms if isinstance(arms, list) else [])
        ]
        tables = [settings for settings in stated_by_arms if isinstance(settings, dict)]
        if not tables or len(tables) < len(stated_by_arms):
            return {}
        return {
            key: value
            for key, value in tables[0].items()
            if key.split(".")[0] in RUN_SECTIONS
            and all(key in other for other in tables)
            and stated(self._table, key) is None
        }

    def _faults_of_arm(self, arm: ArmSpec, known: set[str]) -> Iterator[Fault]:
        """Yield an arm's faults, without those that the recipe has as well."""
        for key in (key for key in arm.set if key.split(".")[0] not in RUN_SECTIONS):
            text = not_one_of("a section", key.split(".")[0], sorted(RUN_SECTIONS))
            yield Fault(f"arms.{arm.name}.set.{key}", text)
        sections: ParsedSections = self.arms[arm.name]
        for fault in (*sections.faults, *section_faults(sections)):
            kind = f"{fault.key.split('.')[0]}.name"
            settings = self._settings(arm)
            own = kind in settings or any(overlap(key, fault.key) for key in settings)
            own = own or fault.key.split(".")[0] not in self._sections
            same = str(fault) if own else fault.key
            if known.isdisjoint({same, str(fault)}):
                known.update({same, str(fault)})
                key = f"arms.{arm.name}.set.{fault.key}" if own else fault.key
                yield Fault(key, fault.text)
