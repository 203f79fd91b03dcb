"""One run, described completely: every section, resolved for one arm and seed."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, JsonValue

from noisekit.core.randomness import stream_seed
from noisekit.core.references import is_reference
from noisekit.train.data.augment import AugmentSpec
from noisekit.train.data.datasets import DataSpec
from noisekit.train.models import ModelSpec
from noisekit.train.recipes.batch_policies import BatchPolicySpec
from noisekit.train.recipes.clock import Clock
from noisekit.train.recipes.design import StartSpec, is_none
from noisekit.train.recipes.format1 import translated_run
from noisekit.train.recipes.measure_spec import MeasureSpec
from noisekit.train.recipes.optimizers import OptimizerSpec
from noisekit.train.recipes.phases import PhaseSpec, with_phase
from noisekit.train.recipes.points import Point
from noisekit.train.recipes.policy_section import OF_READINGS
from noisekit.train.recipes.probe_spec import ProbeSpec
from noisekit.train.recipes.scheduled_policies import ConstantBatch
from noisekit.train.recipes.schedules import Constant, ScheduleSpec
from noisekit.train.recipes.sections import (
    ComputeSpec,
    EvaluationSpec,
    SeriesSpec,
    SnapshotSpec,
    TrainingSpec,
)
from noisekit.train.section import ArmName, Name, NonNegativeInt, RunId, Section


class RunSections(Section):
    """The sections that one arm and seed need, resolved."""

    data: DataSpec
    augment: AugmentSpec = AugmentSpec()
    model: ModelSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec = Constant()
    training: TrainingSpec
    batch_policy: BatchPolicySpec = ConstantBatch()
    phases: tuple[PhaseSpec, ...] = ()
    evaluation: EvaluationSpec
    snapshots: SnapshotSpec = SnapshotSpec()
    series: tuple[SeriesSpec, ...] = ()
    probe: ProbeSpec = ProbeSpec()
    measure: MeasureSpec = MeasureSpec()
    compute: ComputeSpec = ComputeSpec()
    start: StartSpec | None = Field(default=None, exclude_if=is_none)

    @property
    def clock(self) -> Clock:
        """The clock that everything of this run is read off."""
        return Clock.until(
            self.training.stop,
            num_examples=self.data.train,
            epoch_end=self.training.epoch_end,
        )

    @cached_property
    def in_phases(self) -> "tuple[RunSections, ...]":
        """The sections before the first phase, in the first phase, and so on."""
        made = [self]
        for phase in self.phases:
            table = made[-1].model_dump(mode="json", include=_SECTION_NAMES)
            text = json.dumps(with_phase(table, phase.set))
            made.append(RunSections.model_validate_json(text))
        return tuple(made)

    @cached_property
    def policy_needs(self) -> frozenset[str]:
        """What batch policies observe; of the user's own, that is not known here."""
        return frozenset(
            need.name
            for run in self.in_phases
            if not is_reference(run.batch_policy.name)
            for need in run.batch_policy.build(run.training.batch_size).needs
        )

    @property
    def reads_noise(self) -> bool:
        """Whether a probe reads gradient noise, for the record or for a policy."""
        return self.probe.every > 0 or bool(self.policy_needs & OF_READINGS)

    @property
    def max_updates(self) -> int:
        """Most updates that ``training.stop`` allows, whatever a policy decides."""
        clock = self.clock
        sizes = (r.batch_policy.smallest(r.training.batch_size) for r in self.in_phases)
        return clock.updates_to(clock.end, min(sizes))

    @property
    def snapshot_points(self) -> dict[str, Point]:
        """Name and point of each snapshot but ``start`` and ``final``."""
        return self.snapshots.points(self.training.stop)

    @property
    def snapshot_names(self) -> tuple[str, ...]:
        """Names of all snapshots that a run may have."""
        return ("start", *self.snapshot_points, "final")

    def with_own_split(self, seed: int) -> Self:
        """Return the sections with a data split that is drawn for one seed."""
        drawn = stream_seed(self.data.split_seed, "own split", seed) % _SPLIT_SEEDS
        data = self.data.model_copy(update={"split_seed": drawn})
        return self.model_copy(update={"data": data})

    @property
    def named_code(self) -> tuple[str, ...]:
        """Code of the user's own that running imports, as ``module:function``."""
        names = (
            self.data.name,
            self.model.name,
            self.optimizer.name,
            self.training.loss,
            self.batch_policy.name,
            *self.measure.names,
            *(name for series in self.series for name in series.measures),
        )
        return tuple(name for name in names if is_reference(name))


_SECTION_NAMES = set(RunSections.model_fields) - {"phases"}
_SPLIT_SEEDS = 10**9


class RunSpec(RunSections):
    """One arm at one seed: everything that decides the run's bits.

    Attributes:
        format: Version of this description.
        recipe: Name of the recipe.
        run_id: ``<arm>-seed<seed>``, the name of the run's directory.
        arm: Name of the arm.
        seed: Seed of the run's random streams.
        factors: What the arms differ in, by short name, such as ``batch_size``.
        kept_optimizers: Snapshots that the optimizer's state is kept at, since other
            runs go on with it.
    """

    format: Literal[2] = 2
    recipe: str
    run_id: RunId
    arm: ArmName
    seed: NonNegativeInt
    factors: dict[str, JsonValue] = Field(default_factory=dict)
    kept_optimizers: tuple[Name, ...] = Field(
        default=(), exclude_if=lambda names: not names
    )

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
