"""Sections of an experiment's design: seeds, arms, and rules."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from noisekit.train.section import (
    ArmName,
    Name,
    NonNegativeInt,
    PositiveInt,
    Section,
)


def is_none(value: object) -> bool:
    """Whether a key is left out; such keys are not written."""
    return value is None


class SeedsSpec(Section):
    """Which seeds: ``count`` of them from ``first`` on, for every arm.

    Attributes:
        first: The first seed.
        count: Number of seeds.
        split: Whether all seeds share one split of the data, or each has its own, drawn
            from ``data.split_seed`` and the seed.
        planned: Number of seeds that the recipe's file states, where another was asked
            for beside it; written by noisekit.
    """

    first: NonNegativeInt = 0
    count: PositiveInt
    split: Literal["shared", "own"] = Field(
        default="shared", exclude_if=lambda split: split == "shared"
    )
    planned: PositiveInt | None = Field(default=None, exclude_if=is_none)

    def of_arm(self, own: "ArmSeedsSpec | None") -> range:
        """Return the seeds of an arm that states ``own``."""
        if own is None:
            return range(self.first, self.first + self.count)
        first = self.first if own.first is None else own.first
        return range(first, first + min(own.count, self.count))


class ArmSeedsSpec(Section):
    """An arm's own seeds, such as fewer for a trunk.

    Attributes:
        first: The first seed; the recipe's if left out.
        count: Number of seeds, of which an arm has at most ``seeds.count``.
    """

    first: NonNegativeInt | None = None
    count: PositiveInt


class ArmSpec(Section):
    """One arm: what it sets, by dotted key, on top of the recipe.

    Attributes:
        name: Name; with a grid, the first part of the names of its arms.
        set: Dotted keys and their values.
        description: What it is, in words.
        seeds: Its own seeds; those of the arm that it starts from, or the recipe's, if
            left out.
    """

    name: ArmName
    set: dict[str, JsonValue] = Field(default_factory=dict)
    description: str = ""
    seeds: ArmSeedsSpec | None = Field(default=None, exclude_if=is_none)


class StartSpec(Section):
    """Where a run begins: with the weights and buffers of another arm's snapshot.

    The run has a clock of its own, which begins at zero, as do its schedule and its
    stop.

    Attributes:
        arm: The other arm, of which the run of the same seed counts.
        snapshot: Name of one of its snapshots.
        optimizer: Whether the optimizer begins anew (``reset``), or goes on with its
            buffers and step counts (``keep``); its settings are the arm's own.
        order: Which order of the examples: 0 for the permutations that every arm of
            the seed has, another number for others, as in replicates from one point.
        distance_from: What ``distance_from_start`` is measured from: the starting
            weights of the first run of the chain (``origin``), or this run's own
            (``start``).
    """

    arm: ArmName
    snapshot: Name
    optimizer: Literal["reset", "keep"] = "reset"
    order: NonNegativeInt = 0
    distance_from: Literal["origin", "start"] = "origin"


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
