"""The section of a recipe that says how gradient noise is read during training."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from noisekit.core.vocabulary import QuantityName
from noisekit.train.section import NonNegativeInt, PositiveInt, Section

EstimatorChoice = Literal[
    "auto",
    "per_example",
    "rows",
    "chunks",
    "accumulation",
    "random_signs",
    "ghost",
    "preconditioned",
]
"""What a recipe may ask for: a run is one process, so that ``ranks`` has nothing to
read. ``norm_layers`` is offered where ``attach`` is called, not here."""

OF_EXAMPLES = frozenset({"per_example", "rows", "chunks", "random_signs"})
"""Those that say nothing where BatchNorm couples the examples."""


def _listed(value: object) -> object:
    """One name as a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class ProbeSpec(Section):
    """How gradient noise is read during training.

    Attributes:
        every: Updates from one reading to the next; 0 means never.
        estimator: One name or several, read side by side; the first is the reading's
            own.
        ghost_batch: Examples of a ghost batch, for ``ghost``.
        row_share: Share of the examples that ``rows`` draws.
        num_chunks: Parts of the batch for ``chunks``.
        num_signs: Extra backward passes for ``random_signs``.
        quantities: Step metrics that are recorded beside the noise, such as ``gsnr``.
        layers: Whether norms are recorded parameter by parameter too.
    """

    every: NonNegativeInt = 10
    estimator: Annotated[
        tuple[EstimatorChoice, ...], Field(min_length=1), BeforeValidator(_listed)
    ] = ("auto",)
    ghost_batch: PositiveInt | None = None
    row_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    num_chunks: Annotated[int, Field(ge=2)] = 4
    num_signs: PositiveInt = 1
    quantities: tuple[QuantityName, ...] = ()
    layers: bool = False

    @model_validator(mode="after")
    def _estimators_fit_together(self) -> Self:
        names = self.estimator
        if len(set(names)) < len(names):
            raise ValueError(f"estimator needs different names, got {list(names)}")
        if names[0] == "preconditioned":
            raise ValueError(
                "estimator = 'preconditioned' needs another in front of it; write "
                "estimator = ['auto', 'preconditioned']"
            )
        if "ghost" in names and self.ghost_batch is None:
            raise ValueError(
                "estimator = 'ghost' needs ghost_batch, the examples of a ghost batch; "
                "set it to at most half a micro-batch"
            )
        if "ghost" not in names and self.ghost_batch is not None:
            raise ValueError(
                f"ghost_batch = {self.ghost_batch} belongs to estimator = 'ghost'; "
                "name it, or leave ghost_batch out"
            )
        return self
