"""Data sets as tensors in memory, offline first, split the same way each time."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from noisekit.core.errors import DataFileError, UsageError
from noisekit.core.randomness import stream
from noisekit.train.data.data_sources import SOURCES, locate
from noisekit.train.data.idx import read_idx
from noisekit.train.recipes.subjects import DataSpec
from noisekit.train.section import Split

_GAUSSIAN_FEATURES = 20
_GAUSSIAN_CLASSES = 4


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Examples: inputs in float32 and integer classes, in the same order."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)


@dataclass(frozen=True, slots=True)
class DataSplits:
    """A data set, split. The tensors are shared: nobody may write into them.

    Attributes:
        train: Examples that gradients see.
        validation: Examples that choices may look at.
        test: Examples that no choice may look at.
        num_classes: Number of classes.
        name: Name of the data set.
        origin: Where it came from.
        sha256: Digest of all examples before normalisation, in their order.
    """

    train: TensorPair
    validation: TensorPair
    test: TensorPair
    num_classes: int
    name: str
    origin: str
    sha256: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.inputs.shape[1:])

    def items(self) -> tuple[tuple[Split, TensorPair], ...]:
        """Return each split by its name."""
        return (
            ("train", self.train),
            ("validation", self.validation),
            ("test", self.test),
        )


@dataclass(frozen=True, slots=True)
class _Pools:
    """Examples before the split; a set without a test set of its own is one pool."""

    train: TensorPair
    test: TensorPair | None
    num_classes: int
    origin: str


def load_data(spec: DataSpec, *, allow_download: bool = False) -> DataSplits:
    """Return the examples that a recipe's ``[data]`` names.

    The split keeps the shares of the classes, and depends on the sizes and
    ``split_seed`` alone. Test examples are drawn first, so that other sizes of
    training or validation set leave them as they are. Standardising uses the training
    examples' mean and standard deviation, one per channel.

    Args:
        spec: Which examples.
        allow_download: Whether the network may be asked where no file is found.
    """
    return _load(spec, allow_download)


@lru_cache(maxsize=2)
def _load(spec: DataSpec, allow_download: bool) -> DataSplits:
    pools = _READERS[spec.name](spec, allow_download)
    train, validation, test = _split(pools, spec)
    digest = _digest(train, validation, test)
    if spec.normalise == "standardise":
        mean, deviation = _channel_moments(train.inputs)
        train, validation, test = (
            TensorPair((part.inputs - mean) / deviation, part.targets)
            for part in (train, validation, test)
        )
    return DataSplits(
        train=train,
        validation=validation,
        test=test,
        num_classes=pools.num_classes,
        name=spec.name,
        origin=pools.origin,
        sha256=digest,
    )


def _split(pools: _Pools, spec: DataSpec) -> tuple[TensorPair, TensorPair, TensorPair]:
    if pools.test is None:
        asked = {"train, validation and test": spec.train + spec.validation + spec.test}
        _check_size(spec, asked, len(pools.train))
        order = _stratified_order(pools.train.targets, spec, "all")
        test, rest = pools.train, order[spec.test :]
        test_order = order[: spec.test]
    else:
        asked = {"train and validation": spec.train + spec.validation}
        _check_size(spec, asked, len(pools.train))
        _check_size(spec, {"test": spec.test}, len(pools.test))
        test, rest = pools.test, _stratified_order(pools.train.targets, spec, "train")
        test_order = _stratified_order(test.targets, spec, "test")[: spec.test]
    validation, train = torch.split(
        rest[: spec.validation + spec.train], [spec.validation, spec.train]
    )
    return (
        _taken(pools.train, train),
        _taken(pools.train, validation),
        _taken(test, test_order),
    )


def _check_size(spec: DataSpec, asked: Mapping[str, int], there: int) -> None:
    for what, count in asked.items():
        if count > there:
            raise UsageError(
                f"data.{what.replace(' and ', ' and data.').replace(', ', ', data.')} "
                f"need at most {there} examples of {spec.name} together, got {count}; "
                "ask for fewer."
            )


def _taken(pool: TensorPair, order: Tensor) -> TensorPair:
    return TensorPair(pool.inputs[order], pool.targets[order])


def _stratified_order(targets: Tensor, spec: DataSpec, pool: str) -> Tensor:
    """Return a random order whose every prefix has the classes in equal shares."""
    generator = stream(spec.split_seed, "split", spec.name, pool)
    shuffled = torch.randperm(len(targets), generator=generator)
    classes = targets[shuffled]
    # An example's place is its rank within its class, as a fraction of the class.
    place = torch.empty(len(targets), dtype=torch.float64)
    for label in range(int(classes.max()) + 1):
        members = (classes == label).nonzero().squeeze(1)
        count = len(members)
        place[members] = (torch.arange(count).double() + 0.5) / count
    return shuffled[torch.argsort(place, stable=True)]


def _channel_moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per channel; over all where there is none."""
    if inputs.dim() < 3:
        over = tuple(range(inputs.dim()))
    else:
        over = (0, *range(2, inputs.dim()))
    deviation, mean = torch.std_mean(inputs.double(), dim=over, keepdim=True)
    # A constant channel is centred and otherwise left alone.
    return mean.float(), torch.where(deviation > 0, deviation, 1.0).float()


def _digest(*parts: TensorPair) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for tensor in (part.inputs, part.targets):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


def _digits(spec: DataSpec, allow_download: bool) -> _Pools:
    # Importing scikit-learn takes longer than the smallest run.
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    pool = TensorPair(inputs, torch.tensor(targets, dtype=torch.int64))
    return _Pools(pool, None, 10, "scikit-learn's load_digits, real 8x8 scans")


def _idx(spec: DataSpec, allow_download: bool) -> _Pools:
    source = SOURCES[spec.name]
    folder, files = locate(source, spec.path, allow_download=allow_download)
    arrays = {
        key: torch.tensor(read_idx(path, sha256=source.sha256.get(key)))
        for key, path in files.items()
    }
    train, test = (
        TensorPair(
            arrays[f"{part}-images"].unsqueeze(1).float() / 255,
            arrays[f"{part}-labels"].long(),
        )
        for part in ("train", "test")
    )
    return _Pools(train, test, 10, str(folder))


def _cifar10(spec: DataSpec, allow_download: bool) -> _Pools:
    folder, files = locate(SOURCES["cifar10"], spec.path, allow_download=False)
    test = files.pop("test")
    train = [_cifar_records(path) for path in files.values()]
    inputs = torch.cat([part.inputs for part in train])
    targets = torch.cat([part.targets for part in train])
    return _Pools(TensorPair(inputs, targets), _cifar_records(test), 10, str(folder))


def _cifar_records(path: Path) -> TensorPair:
    """Read the binary version: per example a byte of label, then 3 x 32 x 32 bytes."""
    size = 1 + 3 * 32 * 32
    content = np.fromfile(path, np.uint8)
    if len(content) == 0 or len(content) % size:
        raise DataFileError(
            f"{path} needs whole records of {size} bytes, got {len(content)} bytes; it "
            "is damaged, get it again."
        )
    records = torch.from_numpy(content.reshape(-1, size))
    images = records[:, 1:].reshape(-1, 3, 32, 32).float() / 255
    return TensorPair(images, records[:, 0].long())


def _gaussian(spec: DataSpec, allow_download: bool) -> _Pools:
    """Draw classes about random means of unit norm, with known spherical noise."""
    count = spec.train + spec.validation + spec.test
    features = spec.num_features or _GAUSSIAN_FEATURES
    classes = spec.num_classes or _GAUSSIAN_CLASSES
    noise = 1.0 if spec.noise is None else spec.noise
    generator = stream(spec.split_seed, "data", "gaussian")
    means = torch.randn(classes, features, generator=generator)
    means /= means.norm(dim=1, keepdim=True)
    targets = torch.arange(count) % classes
    draws = torch.randn(count, features, generator=generator)
    pool = TensorPair(means[targets] + noise * draws, targets)
    origin = f"{classes} Gaussian classes in {features} dimensions, noise {noise:g}"
    return _Pools(pool, None, classes, origin)


_READERS: Mapping[str, Callable[[DataSpec, bool], _Pools]] = MappingProxyType(
    {
        "cifar10": _cifar10,
        "digits": _digits,
        "fashion-mnist": _idx,
        "gaussian": _gaussian,
        "mnist": _idx,
    }
)
