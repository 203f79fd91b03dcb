"""What every data set of a recipe is: a section that can be read into pools."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from noisekit.train.section import Fraction, NonNegativeInt, PositiveInt, Section


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Examples: inputs and integer classes, in the same order.

    Attributes:
        inputs: Real numbers in float32, or tokens in int64; one row per example.
        targets: The class of each example, ``(n,)``, or of each of its positions,
            ``(n, positions)``.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "TensorPair":
        """Return the examples on a device; tokens keep their type."""
        kept = None if not self.inputs.is_floating_point() else dtype
        return TensorPair(self.inputs.to(device, kept), self.targets.to(device))


@dataclass(frozen=True, slots=True)
class Pools:
    """Examples before the split.

    Attributes:
        train: Examples that training and validation sets are drawn from.
        test: Examples that the test set is drawn from; ``None`` draws all from one.
        num_classes: Number of classes.
        origin: Where the examples came from, for the record.
    """

    train: TensorPair
    test: TensorPair | None
    num_classes: int
    origin: str


class DataSection(Section):
    """Which examples, and how they are split.

    Attributes:
        name: The data set.
        train: Number of training examples.
        validation: Number of examples that choices may look at.
        test: Number of examples that no choice may look at.
        split_seed: Seed of the split, the same for every run of a recipe.
        normalise: ``"standardise"`` by the training examples' own statistics.
        pool: Images are averaged over squares of ``pool`` by ``pool`` pixels before
            anything else; 2 makes 14x14 of 28x28.
        label_noise: Share of the training examples whose label is replaced by another
            class, drawn evenly; rounded to whole examples.
        random_labels: Share of the training examples whose label is drawn anew from
            all classes, the true one included.
        tokens: Whether inputs are tokens, and not real numbers.
    """

    name: str
    train: PositiveInt
    validation: PositiveInt
    test: PositiveInt
    split_seed: NonNegativeInt = 0
    normalise: Literal["standardise", "none"] = "standardise"
    pool: PositiveInt = 1
    label_noise: Fraction = 0.0
    random_labels: Annotated[float, Field(ge=0, le=1)] = 0.0

    tokens: ClassVar[bool] = False

    @model_validator(mode="after")
    def _labels_are_changed_in_one_way(self) -> Self:
        if self.label_noise and self.random_labels:
            raise ValueError(
                "label_noise and random_labels both replace labels; state one of them"
            )
        if self.tokens and (self.pool > 1 or self.label_noise or self.random_labels):
            raise ValueError(
                "pool, label_noise and random_labels need examples with real inputs "
                f"and one label each, got the tokens of {self.name!r}; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _squares_fill_the_image(self) -> Self:
        shape = self.stored_shape
        if self.pool == 1 or shape is None:
            return self
        if len(shape) != 3 or shape[1] % self.pool or shape[2] % self.pool:
            raise ValueError(
                "pool needs to divide height and width of images, got "
                f"{self.pool} for examples of shape {shape}"
            )
        return self

    @property
    @abstractmethod
    def stored_shape(self) -> tuple[int, ...] | None:
        """Shape of one example as stored, where it is known without reading it."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example as a network sees it, as far as known."""
        shape = self.stored_shape
        if shape is None or self.pool == 1:
            return shape
        channels, height, width = shape
        return (channels, height // self.pool, width // self.pool)

    @property
    def known_classes(self) -> int | None:
        """Number of classes, where it is known without reading the data."""
        return 10

    @abstractmethod
    def read(self, *, allow_download: bool) -> Pools:
        """Return all examples, in the order of their files."""
