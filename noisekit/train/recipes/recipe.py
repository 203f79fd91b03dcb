"""A recipe: one experiment, complete and checked, and its description of each run."""

import json
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from noisekit.core.errors import UsageError
from noisekit.stats.contrasts import Contrast
from noisekit.train.recipes.recipe_errors import schema_faults
from noisekit.train.recipes.run_spec import ComputeSpec, RunSections, RunSpec
from noisekit.train.recipes.tables import Table, short_names, stated, with_settings
from noisekit.train.section import (
    Name,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

RUN_SECTIONS = frozenset(RunSections.model_fields)


class SeedsSpec(Section):
    """Which seeds: ``count`` of them from ``first`` on, the same for every arm."""

    first: NonNegativeInt = 0
    count: PositiveInt


class ArmSpec(Section):
    """One arm: what it sets, by dotted key, on top of the recipe."""

    name: Name
    set: dict[str, JsonValue] = Field(default_factory=dict)
    description: str = ""


class ContrastSpec(Section):
    """A contrast that is stated before the runs; see ``stats.Contrast``."""

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
        return self


class RulesSpec(Section):
    """What makes a comparison fair.

    Attributes:
        matched_loss: Largest ratio of two arms' training losses that still counts as
            matched.
        min_pairs: Fewest pairs of seeds behind a verdict.
        rate_selection: How the learning rates were chosen, and on which data.
    """

    matched_loss: Annotated[float, Field(gt=1)] = 1.25
    min_pairs: Annotated[int, Field(ge=2)] = 5
    rate_selection: str = ""


class Recipe(RunSections):
    """One experiment, complete and checked.

    Attributes:
        format: Version of the recipe's shape.
        name: Name of the experiment.
        question: What it asks, in one sentence.
        source: The papers, or what else it rests on.
        title: What this profile is.
        cost: What this profile costs, in words.
        claims: Whether its runs may carry verdicts.
        profile: Name of the profile; empty where none was chosen.
        seeds: Seeds of every arm.
        arms: What is compared.
        contrasts: What is claimed about the arms, with margins.
        analyses: Names of the analyses that answer the question.
        rules: What makes the comparison fair.
    """

    format: Literal[1] = 1
    name: Name
    question: str
    source: str = ""
    title: str = ""
    cost: str = ""
    claims: bool = False
    profile: str = ""
    seeds: SeedsSpec
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=1)]
    contrasts: tuple[ContrastSpec, ...] = ()
    analyses: tuple[str, ...] = ()
    rules: RulesSpec = RulesSpec()

    def to_json(self) -> str:
        """Return the recipe as JSON; ``from_json`` gives an equal one back."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the recipe that ``to_json`` wrote."""
        return cls.model_validate_json(text)

    def stated_contrasts(self) -> tuple[Contrast, ...]:
        """Return the contrasts as the statistics take them."""
        return tuple(Contrast(**spec.model_dump()) for spec in self.contrasts)

    def adjusted(self, *, device: str | None = None, seeds: int | None = None) -> Self:
        """Return the recipe for another device or number of seeds, as far as given.

        Raises:
            UsageError: If there is no such device in PyTorch, or no seed is left.
        """
        compute = {"device": device} if device is not None else {}
        count = {"count": seeds} if seeds is not None else {}
        try:
            return self.model_copy(
                update={
                    "compute": ComputeSpec(**(self.compute.model_dump() | compute)),
                    "seeds": SeedsSpec(**(self.seeds.model_dump() | count)),
                }
            )
        except ValidationError as error:
            (fault,) = schema_faults(error, Section)
            raise UsageError(f"{fault}, for this run of {self.name}.") from error

    def run_specs(self) -> list[RunSpec]:
        """Return every arm at every seed; all arms of a seed stand together."""
        sections = self.model_dump(mode="json", include=set(RUN_SECTIONS))
        names = short_names(dict.fromkeys(key for arm in self.arms for key in arm.set))
        first = self.seeds.first
        return [
            self._run_spec(arm, seed, names, with_settings(sections, arm.set))
            for seed in range(first, first + self.seeds.count)
            for arm in self.arms
        ]

    def _run_spec(
        self, arm: ArmSpec, seed: int, names: dict[str, str], sections: Table
    ) -> RunSpec:
        factors = {name: stated(sections, key) for key, name in names.items()}
        identity: Table = {
            "recipe": self.name,
            "run_id": f"{arm.name}-seed{seed}",
            "arm": arm.name,
            "seed": seed,
            "factors": factors,
        }
        return RunSpec.from_json(json.dumps(identity | sections))
