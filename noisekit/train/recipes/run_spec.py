"""The sections of a recipe: frozen, typed, and complete once resolved for a run."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from noisekit.train.recipes.measure_spec import MeasureSpec
from noisekit.train.recipes.probe_spec import ProbeSpec
from noisekit.train.recipes.subjects import DataSpec, ModelSpec
from noisekit.train.section import (
    Fraction,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class OptimizerSpec(Section):
    """Which optimiser. Momentum is PyTorch's: ``v = momentum v + g; w -= rate v``."""

    name: Literal["sgd", "adam", "adamw"]
    learning_rate: PositiveFloat
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8

    @model_validator(mode="after")
    def _keys_fit_the_optimiser(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum above 0")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum belongs to sgd; {self.name} has betas")
        return self


class ScheduleSpec(Section):
    """How the learning rate changes.

    Attributes:
        name: ``constant``, ``step`` or ``cosine`` (to zero at the last update).
        warmup_updates: Updates of linear rise from ``1/warmup_updates`` of the rate.
        milestones: Where ``step`` multiplies by ``gamma``: below 1 a fraction of the
            longest run that ``training.stop`` allows, else a number of updates.
        gamma: The factor of ``step``.
    """

    name: Literal["constant", "step", "cosine"] = "constant"
    warmup_updates: NonNegativeInt = 0
    milestones: tuple[PositiveFloat, ...] = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _milestones_fit(self) -> Self:
        if (self.name == "step") != bool(self.milestones):
            raise ValueError("milestones are needed by name = 'step', and only there")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones need to rise")
        return self


class StalledSpec(Section):
    """When training counts as stalled.

    Attributes:
        patience_epochs: Epochs without progress that are waited for.
        min_relative_decrease: Fall of the training loss, relative to the best so
            far, that counts as progress.
    """

    patience_epochs: PositiveFloat
    min_relative_decrease: Fraction = 0.01


class StopSpec(Section):
    """When a run ends: at the first of these that holds."""

    epochs: PositiveFloat | None = None
    updates: PositiveInt | None = None
    train_loss: PositiveFloat | None = None
    stalled: StalledSpec | None = None

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        if self.epochs is None and self.updates is None:
            raise ValueError("needs epochs or updates as a bound")
        return self


class TrainingSpec(Section):
    """How many examples an update sees, and when training ends.

    Attributes:
        batch_size: Examples per update, over all micro-batches.
        loss: The loss, as a mean over examples.
        accumulation: Micro-batches per update.
        drop_last: Leave out the examples that do not fill a batch, in each epoch.
        allow_ragged: Let the last batch of an epoch be smaller.
        stop: When the run ends.
    """

    batch_size: PositiveInt
    loss: Literal["cross_entropy"] = "cross_entropy"
    accumulation: PositiveInt = 1
    drop_last: bool = False
    allow_ragged: bool = False
    stop: StopSpec

    @model_validator(mode="after")
    def _batches_are_clear(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation needs to divide batch_size ({self.batch_size}), "
                f"got {self.accumulation}"
            )
        if self.drop_last and self.allow_ragged:
            raise ValueError("drop_last and allow_ragged exclude each other")
        return self


class EvaluationSpec(Section):
    """How often the whole training, validation and test sets are evaluated."""

    every_updates: PositiveInt | None = None
    every_epochs: PositiveFloat | None = None
    batch_size: PositiveInt = 1024

    @model_validator(mode="after")
    def _has_one_interval(self) -> Self:
        if (self.every_updates is None) == (self.every_epochs is None):
            raise ValueError("needs every_updates or every_epochs, and not both")
        return self


class SnapshotSpec(Section):
    """At which points the weights are kept, to be measured.

    The start and the end of a run always are: ``start`` and ``final``.

    Attributes:
        losses: Training losses; ``loss_0.05`` is the first evaluation of ``sustain``
            in a row at or below 0.05.
        sustain: Evaluations in a row that make a crossing.
        epochs: Snapshot names and their epoch.
        updates: Snapshot names and their update.
        stalled: When to take ``stalled``, without ending the run.
    """

    losses: tuple[PositiveFloat, ...] = ()
    sustain: PositiveInt = 3
    epochs: dict[Name, PositiveFloat] = Field(default_factory=dict)
    updates: dict[Name, PositiveInt] = Field(default_factory=dict)
    stalled: StalledSpec | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all snapshots that a run of this recipe may have."""
        return tuple(self._names())

    def _names(self) -> Iterator[str]:
        yield "start"
        yield from (loss_snapshot(loss) for loss in self.losses)
        yield from self.epochs
        yield from self.updates
        if self.stalled:
            yield "stalled"
        yield "final"

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = self.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"snapshot names need to differ, got {twice} twice")
        return self


def loss_snapshot(loss: float) -> str:
    """Return the name of the snapshot at a training loss, such as ``loss_0.05``."""
    return f"loss_{loss:g}"


class ComputeSpec(Section):
    """Where and how the work is done; never part of what is compared.

    Attributes:
        threads: Threads of one run; a sum's rounding depends on it.
        workers: Runs at the same time.
        device: PyTorch's name of the device.
        dtype: Precision of weights and inputs.
        deterministic: Refuse kernels whose result may differ from run to run.
        checkpoint_updates: Updates between two checkpoints.
        keep_checkpoints: Checkpoints that are kept, newest first.
    """

    threads: PositiveInt = 1
    workers: PositiveInt = 2
    device: Annotated[str, Field(pattern=r"^(cpu|cuda|mps|xpu|meta)(:\d+)?$")] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    deterministic: bool = True
    checkpoint_updates: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2


class RunSections(Section):
    """The sections that one arm and seed need, resolved."""

    data: DataSpec
    model: ModelSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec = ScheduleSpec()
    training: TrainingSpec
    evaluation: EvaluationSpec
    snapshots: SnapshotSpec = SnapshotSpec()
    probe: ProbeSpec = ProbeSpec()
    measure: MeasureSpec = MeasureSpec()
    compute: ComputeSpec = ComputeSpec()

    @property
    def updates_per_epoch(self) -> int:
        """Updates in one pass over the training data."""
        whole, rest = divmod(self.data.train, self.training.batch_size)
        return whole + bool(rest and not self.training.drop_last)

    def updates_at(self, epochs: float) -> int:
        """Return the update at which ``epochs`` passes are complete."""
        # 0.1 epochs of 30 updates are 3, not the 4 that 3.0000000000000004 rounds to.
        return math.ceil(round(epochs * self.updates_per_epoch, 6))

    @property
    def max_updates(self) -> int:
        """Most updates that ``training.stop`` allows."""
        stop = self.training.stop
        bounds = [] if stop.updates is None else [stop.updates]
        if stop.epochs is not None:
            bounds.append(self.updates_at(stop.epochs))
        return min(bounds)


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

    format: Literal[1] = 1
    recipe: str
    run_id: Name
    arm: Name
    seed: NonNegativeInt
    factors: dict[str, JsonValue]

    def to_json(self) -> str:
        """Return the description as JSON; ``from_json`` gives an equal one back."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the description that ``to_json`` wrote."""
        return cls.model_validate_json(text)

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> Self:
        """Return the description that a manifest holds as its recipe."""
        return cls.model_validate_json(json.dumps(table))
