"""One run, described completely: every section, resolved for one arm and seed."""

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, JsonValue

from noisekit.train.data.datasets import DataSpec
from noisekit.train.models import ModelSpec
from noisekit.train.recipes.clock import Clock
from noisekit.train.recipes.format1 import translated_run
from noisekit.train.recipes.measure_spec import MeasureSpec
from noisekit.train.recipes.optimizers import OptimizerSpec
from noisekit.train.recipes.probe_spec import ProbeSpec
from noisekit.train.recipes.schedules import Constant, ScheduleSpec
from noisekit.train.recipes.sections import (
    ComputeSpec,
    EvaluationSpec,
    SnapshotSpec,
    TrainingSpec,
)
from noisekit.train.references import is_reference
from noisekit.train.section import Name, NonNegativeInt, RunId, Section


class RunSections(Section):
    """The sections that one arm and seed need, resolved."""

    data: DataSpec
    model: ModelSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec = Constant()
    training: TrainingSpec
    evaluation: EvaluationSpec
    snapshots: SnapshotSpec = SnapshotSpec()
    probe: ProbeSpec = ProbeSpec()
    measure: MeasureSpec = MeasureSpec()
    compute: ComputeSpec = ComputeSpec()

    @property
    def clock(self) -> Clock:
        """The clock that everything of this run is read off."""
        return Clock.until(
            self.training.stop,
            num_examples=self.data.train,
            epoch_end=self.training.epoch_end,
        )

    @property
    def max_updates(self) -> int:
        """Most updates that ``training.stop`` allows."""
        clock = self.clock
        return clock.updates_to(clock.end, self.training.batch_size)

    @property
    def named_code(self) -> tuple[str, ...]:
        """Code of the user's own that running imports, as ``module:function``."""
        names = (
            self.data.name,
            self.model.name,
            self.optimizer.name,
            self.training.loss,
            *self.measure.names,
        )
        return tuple(name for name in names if is_reference(name))


class RunSpec(RunSections):
    """One arm at one seed: everything that decides the run's bits.

    Attributes:
        format: Version of this description.
        recipe: Name of the recipe.
        run_id: ``<arm>-seed<seed>``, the name of the run's directory.
        arm: Name of the arm.
        seed: Seed of the run's random streams.
        factors: What the arms differ in, by short name, such as ``batch_size``.
    """

    format: Literal[2] = 2
    recipe: str
    run_id: RunId
    arm: Name
    seed: NonNegativeInt
    factors: dict[str, JsonValue] = Field(default_factory=dict)

    def to_json(self) -> str:
        """Return the description as JSON; ``from_json`` gives an equal one back."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the description that ``to_json`` wrote."""
        return cls.model_validate_json(text)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """Return the description that a manifest holds, in this format or an older."""
        return cls.model_validate_json(json.dumps(translated_run(table)))
