"""The sections of a recipe that name what is trained: data and network."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from noisekit.train.section import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class DataSpec(Section):
    """Which examples, and how they are split.

    Attributes:
        name: The data set.
        train: Number of training examples.
        validation: Number of examples that choices may look at.
        test: Number of examples that no choice may look at.
        split_seed: Seed of the split, the same for every run of a recipe.
        path: Folder of the files; without it the usual places are looked through.
        normalise: ``"standardise"`` by the training examples' own statistics.
        num_features: Input dimension, for ``gaussian``.
        num_classes: Number of classes, for ``gaussian``.
        noise: Standard deviation about each class mean, for ``gaussian``.
    """

    name: Literal["digits", "fashion-mnist", "mnist", "cifar10", "gaussian"]
    train: PositiveInt
    validation: PositiveInt
    test: PositiveInt
    split_seed: NonNegativeInt = 0
    path: str | None = None
    normalise: Literal["standardise", "none"] = "standardise"
    num_features: PositiveInt | None = None
    num_classes: Annotated[int, Field(ge=2)] | None = None
    noise: PositiveFloat | None = None

    @model_validator(mode="after")
    def _only_gaussian_is_made(self) -> Self:
        made = (self.num_features, self.num_classes, self.noise)
        if self.name != "gaussian" and any(value is not None for value in made):
            raise ValueError(
                "num_features, num_classes and noise belong to name = 'gaussian'"
            )
        return self


class ModelSpec(Section):
    """Which network.

    Attributes:
        name: ``mlp``, ``f1`` (five layers of 512, BatchNorm) or ``small_cnn``.
        hidden: Widths of the hidden layers, for ``mlp``; 128, 128 if left out.
        width: Channels of the first convolution, for ``small_cnn``; 16 if left out.
        norm: Normalisation before each ReLU; ``f1`` always has BatchNorm.
        init: PyTorch's own starting weights, He's normal or Glorot's uniform ones.
    """

    name: Literal["mlp", "f1", "small_cnn"]
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    width: PositiveInt | None = None
    norm: Literal["none", "batch"] | None = None
    init: Literal["default", "he_normal", "glorot_uniform"] = "default"

    @model_validator(mode="after")
    def _keys_fit_the_network(self) -> Self:
        if self.hidden is not None and self.name != "mlp":
            raise ValueError(f"hidden belongs to name = 'mlp', not {self.name!r}")
        if self.width is not None and self.name != "small_cnn":
            raise ValueError(f"width belongs to name = 'small_cnn', not {self.name!r}")
        if self.norm == "none" and self.name == "f1":
            raise ValueError("f1 has BatchNorm: leave norm out, or use name = 'mlp'")
        return self
