"""Data sets as tensors in memory, offline first, split the same way each time."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from pydantic import Discriminator, Tag
from torch import Tensor
from torch.nn.functional import avg_pool2d

from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream
from noisekit.train.data.embedded import Blobs, Digits, Gaussian, Mnist5k, OwnData
from noisekit.train.data.files import Cifar10, Cifar100, FashionMnist, Mnist, Svhn
from noisekit.train.data.folder import ImageFolder
from noisekit.train.data.labels import relabelled
from noisekit.train.data.section import DataSection, Pools, TensorPair
from noisekit.train.data.text import Text
from noisekit.train.section import OWN, Split, kind_of

DataSpec = Annotated[
    Annotated[Digits, Tag("digits")]
    | Annotated[FashionMnist, Tag("fashion-mnist")]
    | Annotated[Mnist, Tag("mnist")]
    | Annotated[Mnist5k, Tag("mnist-5k")]
    | Annotated[Cifar10, Tag("cifar10")]
    | Annotated[Cifar100, Tag("cifar100")]
    | Annotated[Svhn, Tag("svhn")]
    | Annotated[ImageFolder, Tag("folder")]
    | Annotated[Gaussian, Tag("gaussian")]
    | Annotated[Blobs, Tag("blobs")]
    | Annotated[Text, Tag("text")]
    | Annotated[OwnData, Tag(OWN)],
    Discriminator(kind_of()),
]
"""The table of data sets: a new one is a section with ``read``, and a line here."""


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


def load_data(spec: DataSection, *, allow_download: bool = False) -> DataSplits:
    """Return the examples that a recipe's ``[data]`` names.

    The split keeps the shares of the classes, and depends on the sizes and
    ``split_seed`` alone. Test examples are drawn first, so that other sizes of
    training or validation set leave them as they are. Images are pooled first; labels
    are replaced in the training set only. Standardising uses the training examples'
    mean and standard deviation, one per channel; tokens are left as they are.

    Args:
        spec: Which examples.
        allow_download: Whether the network may be asked where no file is found.
    """
    return _load(spec, allow_download)


@lru_cache(maxsize=2)
def _load(spec: DataSection, allow_download: bool) -> DataSplits:
    pools = spec.read(allow_download=allow_download)
    train, validation, test = (_pooled(part, spec) for part in _split(pools, spec))
    train, changed = relabelled(train, pools.num_classes, spec)
    digest = _digest(train, validation, test)
    if spec.normalise == "standardise" and train.inputs.is_floating_point():
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
        origin=f"{pools.origin}; {changed}" if changed else pools.origin,
        sha256=digest,
    )


def _pooled(part: TensorPair, spec: DataSection) -> TensorPair:
    """Average over squares of ``pool`` by ``pool`` pixels."""
    if spec.pool == 1:
        return part
    shape = tuple(part.inputs.shape[1:])
    if len(shape) != 3 or shape[1] % spec.pool or shape[2] % spec.pool:
        raise UsageError(
            f"data.pool = {spec.pool} needs images whose height and width it divides, "
            f"got examples of shape {shape} from {spec.name}; use pool = 1."
        )
    return TensorPair(avg_pool2d(part.inputs, spec.pool), part.targets)


def _split(
    pools: Pools, spec: DataSection
) -> tuple[TensorPair, TensorPair, TensorPair]:
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


def _check_size(spec: DataSection, asked: Mapping[str, int], there: int) -> None:
    for what, count in asked.items():
        if count > there:
            raise UsageError(
                f"data.{what.replace(' and ', ' and data.').replace(', ', ', data.')} "
                f"need at most {there} examples of {spec.name} together, got {count}; "
                "ask for fewer."
            )


def _taken(pool: TensorPair, order: Tensor) -> TensorPair:
    return TensorPair(pool.inputs[order], pool.targets[order])


def _stratified_order(targets: Tensor, spec: DataSection, pool: str) -> Tensor:
    """Return a random order whose every prefix has the classes in equal shares."""
    generator = stream(spec.split_seed, "split", spec.name, pool)
    shuffled = torch.randperm(len(targets), generator=generator)
    if targets.dim() > 1:
        return shuffled  # examples with many targets belong to no class
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
