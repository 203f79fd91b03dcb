"""Points in training: one type for stops, snapshots, milestones, lengths, intervals."""

from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from noisekit.train.section import Fraction, PositiveFloat, PositiveInt, Section

MAX_UPDATES = 999_999_999
"""Checkpoints are named by nine digits, which also sorts them."""

Updates = Annotated[int, Field(ge=1, le=MAX_UPDATES)]
Epochs = Annotated[float, Field(gt=0, le=MAX_UPDATES)]


class StalledSpec(Section):
    """When training counts as stalled.

    Attributes:
        patience_epochs: Epochs without progress before it does.
        min_relative_decrease: Fall of the training loss, relative to the best so
            far, that counts as progress.
    """

    patience_epochs: PositiveFloat
    min_relative_decrease: Fraction = 0.01


class Point(Section):
    """A point in training; with several keys, the one that is reached first.

    Attributes:
        updates: Number of optimizer steps.
        epochs: Passes over the training data.
        share: Share of the longest run that ``training.stop`` allows.
        loss: Training loss; reached at the first of ``sustain`` regular evaluations
            in a row at or below it.
        sustain: Evaluations in a row that make a crossing of ``loss``.
        stalled: Reached once the training loss has stopped falling.
    """

    updates: Updates | None = None
    epochs: Epochs | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    loss: PositiveFloat | None = None
    sustain: PositiveInt = 1
    stalled: StalledSpec | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The stated keys, in the order of the class."""
        return tuple(key for key in _KEYS if getattr(self, key) is not None)

    @property
    def clock_points(self) -> dict[str, "Point"]:
        """Each key whose place is known in advance, as a point of its own."""
        return {
            key: Point.model_construct({key}, **{key: getattr(self, key)})
            for key in self.keys
            if key in _CLOCK_KEYS
        }

    @model_serializer(mode="wrap")
    def _stated(self, write: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        """Write the stated keys only, as a recipe has them."""
        written: dict[str, JsonValue] = write(self)
        keys = (*self.keys, "sustain") if self.sustain > 1 else self.keys
        return {key: written[key] for key in keys}

    @model_validator(mode="after")
    def _has_a_key(self) -> Self:
        if not self.keys:
            raise ValueError(f"needs one of {', '.join(_KEYS)}")
        if self.loss is None and self.sustain != 1:
            raise ValueError("sustain belongs to loss")
        return self


_CLOCK_KEYS = ("updates", "epochs", "share")
_KEYS = (*_CLOCK_KEYS, "loss", "stalled")


def _one_length(point: Point) -> Point:
    if len(point.keys) != 1 or not point.clock_points:
        raise ValueError(
            f"needs exactly one of {', '.join(_CLOCK_KEYS)}, got "
            f"{', '.join(point.keys)}"
        )
    return point


def _bounded(point: Point) -> Point:
    if point.share is not None:
        raise ValueError("share is a share of this bound; use updates or epochs")
    if not point.clock_points:
        raise ValueError("needs epochs or updates as a bound")
    return point


Length = Annotated[Point, AfterValidator(_one_length)]
"""A length of training or an interval: known in advance, in one unit."""

Stop = Annotated[Point, AfterValidator(_bounded)]
"""Where a run ends; bounded by updates or epochs."""
