"""Sections of a recipe: training, evaluation, snapshots, and where to compute."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from noisekit.train.losses import LOSSES
from noisekit.train.recipes.clock import EpochEnd
from noisekit.train.recipes.points import Length, Point, Stop
from noisekit.train.recipes.recipe_errors import not_one_of
from noisekit.train.references import is_reference
from noisekit.train.section import Name, PositiveFloat, PositiveInt, Section


def _known_loss(name: str) -> str:
    if name not in LOSSES and not is_reference(name):
        raise ValueError(not_one_of("a loss", name, (*LOSSES, "module:function")))
    return name


class TrainingSpec(Section):
    """How many examples an update sees, and when training ends.

    Attributes:
        batch_size: Examples per update.
        microbatch: Examples per forward pass, which BatchNorm normalises together;
            the whole batch if left out. Their gradients are averaged.
        epoch_end: What happens where a batch does not fit into the rest of an epoch:
            batches need to divide it, the rest is left out (``drop``), the last batch
            is smaller (``ragged``) or runs on into the next epoch (``run_on``).
        loss: The loss, as a mean over examples.
        stop: Where the run ends: at the first of its keys that is reached.
    """

    batch_size: PositiveInt
    microbatch: PositiveInt | None = None
    epoch_end: EpochEnd = "divides"
    loss: Annotated[str, AfterValidator(_known_loss)] = "cross_entropy"
    stop: Stop

    @property
    def examples_per_forward(self) -> int:
        """Examples of one forward pass."""
        return self.microbatch or self.batch_size

    @model_validator(mode="after")
    def _microbatches_fill_the_batch(self) -> Self:
        if self.microbatch is not None and self.batch_size % self.microbatch:
            raise ValueError(
                f"microbatch needs to divide batch_size ({self.batch_size}), "
                f"got {self.microbatch}"
            )
        return self


class EvaluationSpec(Section):
    """How often the whole training, validation and test sets are evaluated."""

    every: Length
    batch_size: PositiveInt = 1024


class SnapshotSpec(Section):
    """At which points the weights are kept, to be measured.

    The start and the end of a run always are: ``start`` and ``final``.

    Attributes:
        losses: Training losses; ``loss_0.05`` is the first evaluation of ``sustain``
            in a row at or below 0.05.
        sustain: Evaluations in a row that make a crossing of ``losses``.
        at: Snapshot names and their points.
    """

    losses: tuple[PositiveFloat, ...] = ()
    sustain: PositiveInt = 3
    at: dict[Name, Point] = Field(default_factory=dict)

    @property
    def points(self) -> dict[str, Point]:
        """Name and point of each snapshot but ``start`` and ``final``."""
        crossings = {
            loss_snapshot(loss): Point(loss=loss, sustain=self.sustain)
            for loss in self.losses
        }
        return crossings | self.at

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all snapshots that a run of this recipe may have."""
        return ("start", *self.points, "final")

    def _stated_names(self) -> Iterator[str]:
        yield "start"
        yield from (loss_snapshot(loss) for loss in self.losses)
        yield from self.at
        yield "final"

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = list(self._stated_names())
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
    device: Annotated[str, Field(pattern=r"^(cpu|cuda|mps|xpu)(:\d+)?$")] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    deterministic: bool = True
    checkpoint_updates: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
