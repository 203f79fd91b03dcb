"""Batch policies of recipes: each a section that builds the policy it names.

What a rule decides is in ``noisekit.policies``, which training loops of one's own use
as well; here is how a recipe states it.
"""

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from noisekit import policies
from noisekit.core.errors import UsageError
from noisekit.policies import At, Policy
from noisekit.train.recipes.points import Length
from noisekit.train.references import resolve
from noisekit.train.section import (
    OWN,
    OwnSection,
    Section,
    kind_of,
)

BatchSize = Annotated[int, Field(ge=1, le=10**9)]


class BatchPolicySection(Section):
    """What decides the batch size of each update.

    Attributes:
        name: The policy.
    """

    name: str

    @abstractmethod
    def build(self, batch_size: int) -> Policy:
        """Return the policy.

        Args:
            batch_size: ``training.batch_size``.
        """

    def smallest(self, batch_size: int) -> int:
        """Return the smallest batch that the policy may ask for."""
        return self.build(batch_size).bounds()[0]


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
        every = None if self.every is None else _at(self.every)
        return {"at": tuple(map(_at, self.at)), "every": every}


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


class OwnPolicy(OwnSection, BatchPolicySection, extra="allow"):
    """The user's own policy: ``module:Class``, called with the other keys."""

    def build(self, batch_size: int) -> Policy:
        """Call the class."""
        kind = resolve(self.name)
        made = kind(**self.arguments) if callable(kind) else kind
        if not isinstance(made, Policy):
            raise UsageError(
                f"batch_policy.name = {self.name!r} needs to return a "
                f"noisekit.Policy, got {type(made).__name__}."
            )
        return made

    def smallest(self, batch_size: int) -> int:
        """Return 1: to ask the policy would import it."""
        return 1


def _at(length: Length) -> At:
    """Return a point in the terms of policies."""
    (unit,) = length.keys
    return At(**{unit: getattr(length, unit)})


BatchPolicySpec = Annotated[
    Annotated[ConstantBatch, Tag("constant")]
    | Annotated[TableBatch, Tag("table")]
    | Annotated[GrowthBatch, Tag("growth")]
    | Annotated[OwnPolicy, Tag(OWN)],
    Discriminator(kind_of("constant")),
]
"""The table of batch policies: a new one is a section with ``build``, and a line."""
