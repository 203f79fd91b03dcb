"""Data sets that need no files: digits, Gaussian classes, and the user's own."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream
from noisekit.train.data.section import DataSection, Pools, TensorPair
from noisekit.train.references import resolve
from noisekit.train.section import OwnSection, PositiveFloat, PositiveInt

_FEATURES = 20
_CLASSES = 4


class Digits(DataSection):
    """1,797 scans of handwritten digits, 8x8, which come with scikit-learn."""

    name: Literal["digits"] = "digits"

    @property
    def shape(self) -> tuple[int, ...]:
        """One channel of 8x8."""
        return (1, 8, 8)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the scans, with pixels from 0 to 1."""
        # Importing scikit-learn takes longer than the smallest run.
        from sklearn.datasets import load_digits

        images, targets = load_digits(return_X_y=True)
        inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        pool = TensorPair(inputs, torch.tensor(targets, dtype=torch.int64))
        return Pools(pool, None, 10, "scikit-learn's load_digits, real 8x8 scans")


class Gaussian(DataSection):
    """Classes about random means of unit norm, with known spherical noise.

    Attributes:
        num_features: Input dimension; 20 if left out.
        num_classes: Number of classes; 4 if left out.
        noise: Standard deviation about each class mean; 1 if left out.
    """

    name: Literal["gaussian"] = "gaussian"
    num_features: PositiveInt | None = None
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = None
    noise: PositiveFloat | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """A vector of features."""
        return (self.num_features or _FEATURES,)

    @property
    def known_classes(self) -> int:
        """As stated."""
        return self.num_classes or _CLASSES

    def read(self, *, allow_download: bool) -> Pools:
        """Draw the examples, from a stream that ``split_seed`` decides."""
        count = self.train + self.validation + self.test
        (features,), classes = self.shape, self.known_classes
        noise = 1.0 if self.noise is None else self.noise
        generator = stream(self.split_seed, "data", "gaussian")
        means = torch.randn(classes, features, generator=generator)
        means /= means.norm(dim=1, keepdim=True)
        targets = torch.arange(count) % classes
        draws = torch.randn(count, features, generator=generator)
        pool = TensorPair(means[targets] + noise * draws, targets)
        origin = f"{classes} Gaussian classes in {features} dimensions, noise {noise:g}"
        return Pools(pool, None, classes, origin)


class OwnData(OwnSection, DataSection, extra="allow"):
    """The user's own data set: ``module:function``, called with the other keys.

    The function returns the inputs and integer targets of all examples, or
    :class:`Pools` where it has a test set of its own.
    """

    @property
    def shape(self) -> None:
        """Unknown before the data are read."""

    @property
    def known_classes(self) -> None:
        """Unknown before the data are read."""

    def read(self, *, allow_download: bool) -> Pools:
        """Call the function."""
        function = resolve(self.name)
        found = function(**self.arguments) if callable(function) else function
        if isinstance(found, Pools):
            return found
        if not (
            isinstance(found, tuple)
            and len(found) == 2
            and all(isinstance(part, Tensor) for part in found)
        ):
            raise UsageError(
                f"data.name = {self.name!r} needs to return (inputs, targets) as "
                f"tensors, or Pools, got {type(found).__name__}."
            )
        pair = TensorPair(found[0].float(), found[1].long())
        return Pools(pair, None, int(pair.targets.max()) + 1, self.name)
