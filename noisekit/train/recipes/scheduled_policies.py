"""Batch policies of recipes that need nothing but the position in training."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from noisekit import policies
from noisekit.policies import Policy
from noisekit.train.recipes.points import Length
from noisekit.train.recipes.policy_section import (
    BatchPolicySection,
    BatchSize,
    point_of,
)


class ByClock(BatchPolicySection):
    """A policy that needs nothing but the position in training."""

    @property
    def places(self) -> tuple[Length, ...]:
        """Where the batch size changes."""
        return ()

    @property
    def intervals(self) -> tuple[Length, ...]:
        """Distances of such places, counted from the start."""
        return ()


class ConstantBatch(ByClock):
    """``training.batch_size`` throughout."""

    name: Literal["constant"] = "constant"

    def build(self, batch_size: int) -> Policy:
        """Return the constant policy."""
        return policies.Constant(batch_size)


class _AtPoints(ByClock):
    """Changes at stated points, or at every interval.

    Attributes:
        at: Points of the changes.
        every: Distance of the changes, in place of ``at``.
    """

    at: tuple[Length, ...] = ()
    every: Length | None = None

    @model_validator(mode="after")
    def _points_are_stated_once(self) -> Self:
        if bool(self.at) == (self.every is not None):
            raise ValueError("needs either at, a list of points, or every")
        return self

    @property
    def places(self) -> tuple[Length, ...]:
        """The stated points."""
        return self.at

    @property
    def intervals(self) -> tuple[Length, ...]:
        """The stated interval."""
        return () if self.every is None else (self.every,)

    @property
    def _changes(self) -> dict[str, Any]:
        every = None if self.every is None else point_of(self.every)
        return {"at": tuple(map(point_of, self.at)), "every": every}


class TableBatch(_AtPoints):
    """One size after the other.

    Attributes:
        sizes: The sizes, in order; one more than ``at`` has points.
        cyclic: Whether the first follows the last; needs ``every``.
    """

    name: Literal["table"] = "table"
    sizes: Annotated[tuple[BatchSize, ...], Field(min_length=1)]
    cyclic: bool = False

    @model_validator(mode="after")
    def _every_size_has_a_point(self) -> Self:
        if self.at and self.cyclic:
            raise ValueError("cyclic = true needs every, the length of each size")
        if self.at and len(self.sizes) != len(self.at) + 1:
            raise ValueError(
                f"needs one size more than at has points ({len(self.at)}), got "
                f"{len(self.sizes)}"
            )
        return self

    def build(self, batch_size: int) -> Policy:
        """Return the table."""
        return policies.Table(self.sizes, cyclic=self.cyclic, **self._changes)


class GrowthBatch(_AtPoints):
    """``training.batch_size`` times a power of ``factor``, rounded down.

    Attributes:
        factor: Growth at each change.
        max: Largest batch.
        beyond: What becomes of the growth that ``max`` forbids: the rate falls by it
            (``rate``), or nothing (``stay``).
    """

    name: Literal["growth"] = "growth"
    factor: Annotated[float, Field(gt=1, le=10**6)]
    max: BatchSize
    beyond: Literal["rate", "stay"] = "stay"

    def build(self, batch_size: int) -> Policy:
        """Return the growth."""
        return policies.Growth(
            batch_size,
            factor=self.factor,
            max=self.max,
            beyond=self.beyond,
            **self._changes,
        )
