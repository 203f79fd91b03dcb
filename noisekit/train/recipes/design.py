"""Sections of an experiment's design: seeds, arms, contrasts, and rules."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from noisekit.train.section import (
    Name,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


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
        fraction = self.quantity.endswith("_error")
        if self.scale == "difference" and fraction and self.margin >= 1:
            raise ValueError(
                f"margin of a difference of {self.quantity} is a fraction below 1, "
                f"such as 0.005 for half a point; got {self.margin}"
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
