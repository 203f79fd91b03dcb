"""Data sets that come as files: MNIST and its kin, CIFAR and SVHN."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from noisekit.core.errors import DataFileError
from noisekit.train.data.idx import read_idx
from noisekit.train.data.section import DataSection, Pools, TensorPair
from noisekit.train.data.sources import SOURCES, from_torchvision, locate


class FileSection(DataSection):
    """A data set in files.

    Attributes:
        path: Folder of the files; without it the usual places are looked through.
    """

    path: str | None = None


class Mnist(FileSection):
    """70,000 handwritten digits, 28x28, in IDX files."""

    name: Literal["mnist"] = "mnist"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """One channel of 28x28."""
        return (1, 28, 28)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the images, with pixels from 0 to 1."""
        return _idx_pools(self, allow_download)


class FashionMnist(FileSection):
    """70,000 pictures of clothes, 28x28, in IDX files."""

    name: Literal["fashion-mnist"] = "fashion-mnist"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """One channel of 28x28."""
        return (1, 28, 28)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the images, with pixels from 0 to 1."""
        return _idx_pools(self, allow_download)


class Cifar10(FileSection):
    """60,000 colour photographs, 32x32, in the publishers' binary version."""

    name: Literal["cifar10"] = "cifar10"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Three channels of 32x32."""
        return (3, 32, 32)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the photographs, with pixels from 0 to 1."""
        return _cifar_pools(self, 10, allow_download)


class Cifar100(FileSection):
    """60,000 colour photographs of 100 classes, 32x32."""

    name: Literal["cifar100"] = "cifar100"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Three channels of 32x32."""
        return (3, 32, 32)

    @property
    def known_classes(self) -> int:
        """The fine classes."""
        return 100

    def read(self, *, allow_download: bool) -> Pools:
        """Return the photographs, with pixels from 0 to 1, and their fine classes."""
        return _cifar_pools(self, 100, allow_download)


class Svhn(FileSection):
    """99,289 colour photographs of house numbers' digits, 32x32, as cropped."""

    name: Literal["svhn"] = "svhn"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Three channels of 32x32."""
        return (3, 32, 32)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the photographs, with pixels from 0 to 1."""
        source = SOURCES[self.name]
        folder, _ = locate(source, self.path, allow_download=allow_download)
        train, test = (
            from_torchvision(source, folder, split=split) for split in ("train", "test")
        )
        return Pools(train, test, 10, str(folder))


def _idx_pools(spec: Mnist | FashionMnist, allow_download: bool) -> Pools:
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
    return Pools(train, test, 10, str(folder))


def _cifar_pools(
    spec: Cifar10 | Cifar100, num_classes: int, allow_download: bool
) -> Pools:
    """Read the publishers' binary version, or else what torchvision has stored."""
    source = SOURCES[spec.name]
    folder, files = locate(source, spec.path, allow_download=allow_download)
    if any(path.suffix != ".bin" for path in files.values()):
        train, test = (
            from_torchvision(source, folder.parent, train=train)
            for train in (True, False)
        )
        return Pools(train, test, num_classes, str(folder))
    num_labels = 2 if num_classes == 100 else 1
    records = {name: _cifar_records(path, num_labels) for name, path in files.items()}
    test = records.pop("test")
    train = TensorPair(
        torch.cat([part.inputs for part in records.values()]),
        torch.cat([part.targets for part in records.values()]),
    )
    return Pools(train, test, num_classes, str(folder))


def _cifar_records(path: Path, num_labels: int) -> TensorPair:
    """Read the binary version: per example bytes of labels, then 3 x 32 x 32 pixels.

    The last label counts: CIFAR-100 has the coarse class in front of the fine one.
    """
    size = num_labels + 3 * 32 * 32
    content = np.fromfile(path, np.uint8)
    if len(content) == 0 or len(content) % size:
        raise DataFileError(
            f"{path} needs whole records of {size} bytes, got {len(content)} bytes; it "
            "is damaged, get it again."
        )
    records = torch.from_numpy(content.reshape(-1, size))
    images = records[:, num_labels:].reshape(-1, 3, 32, 32).float() / 255
    return TensorPair(images, records[:, num_labels - 1].long())
