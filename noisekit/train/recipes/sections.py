"""Sections of a recipe: training, evaluation, snapshots, series, where to compute."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from noisekit.core.references import is_reference
from noisekit.train.gradients.terms import TermSpec, passes_per_update
from noisekit.train.losses import LOSSES, Loss, find_loss
from noisekit.train.recipes.clock import EpochEnd
from noisekit.train.recipes.measure_spec import MeasureName
from noisekit.train.recipes.points import Length, Point, Stop
from noisekit.train.recipes.recipe_errors import not_one_of
from noisekit.train.section import (
    Fraction,
    Name,
    PositiveFloat,
    PositiveInt,
    Section,
    Split,
)


def _known_loss(name: str) -> str:
    if name not in LOSSES and not is_reference(name):
        raise ValueError(not_one_of("a loss", name, (*LOSSES, "module:function")))
    return name


class TrainingSpec(Section):
    """How many examples an update sees, and when training ends.

    Attributes:
        batch_size: Examples per update.
        microbatch: Examples per forward pass, which BatchNorm normalises together;
            the whole batch if left out. It stays what it is where the batch size
            changes; the last part of a batch may be smaller. Gradients are averaged
            over examples.
        epoch_end: What happens where a batch does not fit into the rest of an epoch:
            batches need to divide it, the rest is left out (``drop``), the last batch
            is smaller (``ragged``) or runs on into the next epoch (``run_on``).
        loss: The loss, as a mean over examples.
        label_smoothing: Share of the target that all classes have evenly, under
            cross-entropy.
        clip_norm: Largest norm of an update's gradient, which is scaled down to it;
            no limit if left out.
        terms: What is added to the gradient, each kind at most once.
        stop: Where the run ends: at the first of its keys that is reached.
    """

    batch_size: PositiveInt
    microbatch: PositiveInt | None = None
    epoch_end: EpochEnd = "divides"
    loss: Annotated[str, AfterValidator(_known_loss)] = "cross_entropy"
    label_smoothing: Fraction = 0.0
    clip_norm: PositiveFloat | None = None
    terms: tuple[TermSpec, ...] = ()
    stop: Stop

    @property
    def passes_per_update(self) -> int:
        """Forward and backward passes over the batch, more than 1 with terms."""
        several = self.examples_per_forward < self.batch_size
        return passes_per_update(self.terms, several=several)

    def find_loss(self) -> Loss:
        """Return the loss, imported where it is the user's own."""
        return find_loss(self.loss, label_smoothing=self.label_smoothing)

    @property
    def examples_per_forward(self) -> int:
        """Examples of one forward pass."""
        return self.microbatch or self.batch_size

    @model_validator(mode="after")
    def _rules_fit_together(self) -> Self:
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(
                "label_smoothing belongs to loss = 'cross_entropy', got "
                f"{self.loss!r}; leave it out"
            )
        kinds = [term.kind for term in self.terms]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"terms need different kinds, got {twice} twice")
        return self

    @model_validator(mode="after")
    def _a_microbatch_is_a_part_of_the_batch(self) -> Self:
        if self.microbatch is not None and self.microbatch > self.batch_size:
            raise ValueError(
                f"microbatch needs at most batch_size ({self.batch_size}) examples, "
                f"got {self.microbatch}"
            )
        return self


SPLITS: tuple[Split, ...] = get_args(Split)


class EvaluationSpec(Section):
    """How often whole parts of the data are evaluated.

    Snapshots are evaluated on all parts.

    Attributes:
        every: From one evaluation to the next.
        splits: Which parts; what is left out costs nothing between snapshots.
        batch_size: Examples per forward pass.
    """

    every: Length
    splits: Annotated[tuple[Split, ...], Field(min_length=1)] = SPLITS
    batch_size: PositiveInt = 1024


class SnapshotSpec(Section):
    """At which points the weights are kept, to be measured.

    The start and the end of a run always are: ``start`` and ``final``.

    Attributes:
        losses: Training losses; ``loss_0.05`` is the first evaluation of ``sustain``
            in a row at or below 0.05.
        sustain: Evaluations in a row that make a crossing of ``losses``.
        at: Snapshot names and their points.
        every: Names and intervals: ``epoch = { epochs = 4 }`` keeps ``epoch_4``,
            ``epoch_8`` and so on.
    """

    losses: tuple[PositiveFloat, ...] = ()
    sustain: PositiveInt = 3
    at: dict[Name, Point] = Field(default_factory=dict)
    every: dict[Name, Length] = Field(default_factory=dict)

    def points(self, stop: Point) -> dict[str, Point]:
        """Return name and point of each snapshot but ``start`` and ``final``.

        Args:
            stop: Where the run ends at the latest.
        """
        crossings = {
            loss_snapshot(loss): Point(loss=loss, sustain=self.sustain)
            for loss in self.losses
        }
        repeated = [
            item
            for name, length in self.every.items()
            for item in multiples(name, length, stop)
        ]
        return crossings | self.at | dict(repeated)

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


def multiples(name: str, length: Point, stop: Point) -> Iterator[tuple[str, Point]]:
    """Yield each multiple of a length up to the stop, named by its amount.

    None where the stop has no bound in the length's unit.
    """
    (unit,) = length.keys
    amount = getattr(length, unit)
    end = 1 if unit == "share" else getattr(stop, unit)
    for number in range(1, 1 + int((end or 0) / amount + 1e-9)):
        place = min(number * amount, end)
        yield f"{name}_{place:g}", Point.model_validate({unit: place})


def loss_snapshot(loss: float) -> str:
    """Return the name of the snapshot at a training loss, such as ``loss_0.05``."""
    return f"loss_{loss:g}"


class SeriesSpec(Section):
    """Measures taken along the run, of weights that are not kept.

    Their rows are in the ``measurements`` table, with the update and no snapshot.

    Attributes:
        every: From one measurement to the next; the first is at the start.
        measures: Names of measures, as in ``measure.everywhere``.
    """

    every: Length
    measures: Annotated[tuple[MeasureName, ...], Field(min_length=1)]


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
