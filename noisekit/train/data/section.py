"""What every data set of a recipe is: a section that can be read into pools."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from noisekit.train.section import NonNegativeInt, PositiveInt, Section


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Examples: inputs in float32 and integer classes, in the same order."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)


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
    """

    name: str
    train: PositiveInt
    validation: PositiveInt
    test: PositiveInt
    split_seed: NonNegativeInt = 0
    normalise: Literal["standardise", "none"] = "standardise"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where it is known without reading the data."""

    @property
    def known_classes(self) -> int | None:
        """Number of classes, where it is known without reading the data."""
        return 10

    @abstractmethod
    def read(self, *, allow_download: bool) -> Pools:
        """Return all examples, in the order of their files."""
