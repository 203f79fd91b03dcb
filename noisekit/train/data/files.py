"""Data sets that come as files: MNIST and its kin, and CIFAR-10."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from noisekit.core.errors import DataFileError
from noisekit.train.data.idx import read_idx
from noisekit.train.data.section import DataSection, Pools, TensorPair
from noisekit.train.data.sources import SOURCES, locate


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
    def shape(self) -> tuple[int, ...]:
        """One channel of 28x28."""
        return (1, 28, 28)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the images, with pixels from 0 to 1."""
        return _idx_pools(self, allow_download)


class FashionMnist(FileSection):
    """70,000 pictures of clothes, 28x28, in IDX files."""

    name: Literal["fashion-mnist"] = "fashion-mnist"

    @property
    def shape(self) -> tuple[int, ...]:
        """One channel of 28x28."""
        return (1, 28, 28)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the images, with pixels from 0 to 1."""
        return _idx_pools(self, allow_download)


class Cifar10(FileSection):
    """60,000 colour photographs, 32x32, in the publishers' binary version."""

    name: Literal["cifar10"] = "cifar10"

    @property
    def shape(self) -> tuple[int, ...]:
        """Three channels of 32x32."""
        return (3, 32, 32)

    def read(self, *, allow_download: bool) -> Pools:
        """Return the photographs, with pixels from 0 to 1."""
        folder, files = locate(SOURCES[self.name], self.path, allow_download=False)
        test = files.pop("test")
        train = [_cifar_records(path) for path in files.values()]
        inputs = torch.cat([part.inputs for part in train])
        targets = torch.cat([part.targets for part in train])
        pool = TensorPair(inputs, targets)
        return Pools(pool, _cifar_records(test), 10, str(folder))


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
