"""Where data sets lie on a machine, and the ways to get those that do not."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from noisekit.core.errors import DataFileError, DataNotFoundError
from noisekit.train.data.idx import find_files
from noisekit.train.data.section import TensorPair

_DEBIAN = Path("/usr/share/datasets")
_IDX_FILES = MappingProxyType(
    {
        "train-images": "train-images-idx3-ubyte",
        "train-labels": "train-labels-idx1-ubyte",
        "test-images": "t10k-images-idx3-ubyte",
        "test-labels": "t10k-labels-idx1-ubyte",
    }
)


@dataclass(frozen=True, slots=True)
class Source:
    """A data set that comes as files.

    Attributes:
        name: Its name in recipes.
        files: What each file is for, and its name.
        other_files: The same of another version of the data set, looked for where the
            first is missing.
        folders: Folders below a data folder that hold it, as its publishers and
            torchvision call them.
        ways: How to get it.
        sha256: Digests of the unpacked files, where they are known.
        debian: Whether a Debian package has it.
        torchvision: The class that downloads it, if that is offered.
    """

    name: str
    files: Mapping[str, str]
    folders: tuple[str, ...]
    ways: tuple[str, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)
    debian: bool = False
    torchvision: str = ""
    other_files: Mapping[str, str] = field(default_factory=dict)


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        source.name: source
        for source in (
            Source(
                name="fashion-mnist",
                files=_IDX_FILES,
                folders=("fashion-mnist", "FashionMNIST/raw"),
                ways=("apt-get install dataset-fashion-mnist",),
                sha256=MappingProxyType(
                    {
                        "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8"
                        "a3f3276145d20f83aa44d888",
                        "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2"
                        "e1246121d8633921760443d9",
                        "test-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca"
                        "49f1dbef5c9a5cd8815ce37b",
                        "test-labels": "0402a96d92fd2663957122ceb108a494c5af83da"
                        "b82d92729df917d7dec38c34",
                    }
                ),
                debian=True,
                torchvision="FashionMNIST",
            ),
            Source(
                name="mnist",
                files=_IDX_FILES,
                folders=("mnist", "MNIST/raw"),
                ways=(),
                torchvision="MNIST",
            ),
            Source(
                name="cifar10",
                files=MappingProxyType(
                    {f"train-{i}": f"data_batch_{i}.bin" for i in range(1, 6)}
                    | {"test": "test_batch.bin"}
                ),
                folders=("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"),
                ways=("unpack the publishers' CIFAR-10 binary version",),
                torchvision="CIFAR10",
                other_files=MappingProxyType(
                    {f"train-{i}": f"data_batch_{i}" for i in range(1, 6)}
                    | {"test": "test_batch", "classes": "batches.meta"}
                ),
            ),
            Source(
                name="cifar100",
                files=MappingProxyType({"train": "train.bin", "test": "test.bin"}),
                folders=("cifar100", "cifar-100-binary", "cifar-100-python"),
                ways=("unpack the publishers' CIFAR-100 binary version",),
                torchvision="CIFAR100",
                other_files=MappingProxyType(
                    {"train": "train", "test": "test", "classes": "meta"}
                ),
            ),
            Source(
                name="svhn",
                files=MappingProxyType(
                    {"train": "train_32x32.mat", "test": "test_32x32.mat"}
                ),
                folders=("svhn", ""),
                ways=("get the publishers' cropped digits (format 2)",),
                torchvision="SVHN",
            ),
        )
    }
)


def data_home() -> Path:
    """Return the folder that downloads go to: ``$NOISEKIT_DATA``, or a cache."""
    given = os.environ.get("NOISEKIT_DATA")
    return Path(given) if given else Path.home() / ".cache" / "noisekit" / "data"


def locate(
    source: Source, path: str | None, *, allow_download: bool
) -> tuple[Path, dict[str, Path]]:
    """Return the folder of a data set and its files.

    Looked through are the given path and nothing else; without one, the data folder
    and then the Debian package's place.

    Raises:
        DataNotFoundError: If it is in none of them; the message lists the ways to
            get it.
    """
    places = list(_places(source, path))
    for attempt in range(2):
        for place in places:
            for version in (source.files, source.other_files):
                files = find_files(place, version) if version else None
                if files is not None:
                    return place, files
        if attempt or not (allow_download and source.torchvision):
            break
        _download(source, data_home() if path is None else Path(path))
    raise DataNotFoundError(_not_found(source, path, places))


def _places(source: Source, path: str | None) -> Iterator[Path]:
    root = data_home() if path is None else Path(path).expanduser()
    if path is not None:
        # Not so below the data folder: MNIST's kin share the names of their files.
        yield root
    yield from (root / folder for folder in source.folders)
    if path is None and source.debian:
        yield _DEBIAN / source.name


def _not_found(source: Source, path: str | None, places: list[Path]) -> str:
    files = ", ".join(source.files.values())
    ways = [
        *source.ways,
        f"put {files} (packed by gzip or not) into a folder, and name it by data.path "
        f"in the recipe; or into {source.folders[0]} below the folder that the "
        "environment variable NOISEKIT_DATA names",
    ]
    if source.torchvision:
        ways.append("--allow-download, which asks the network")
    lines = [
        f"data set {source.name!r} needs its files, found in none of "
        f"{', '.join(map(str, places))}. Ways to get it:",
        *(f"  - {way}" for way in ways),
    ]
    return "\n".join(lines)


def from_torchvision(source: Source, root: Path, **part: bool | str) -> TensorPair:
    """Return a part of a data set as torchvision reads it, with pixels from 0 to 1.

    torchvision compares each file with the publishers' digest before it opens it.

    Args:
        source: The data set.
        root: The folder that torchvision was given.
        part: Which part, in the words of its class, such as ``train=True``.

    Raises:
        DataFileError: If a file is not as published.
    """
    from torchvision import datasets

    try:
        found = getattr(datasets, source.torchvision)(root, **part)
    except (OSError, RuntimeError) as error:
        raise DataFileError(
            f"{root} needs the files of {source.name} as published: {error}; get them "
            "again."
        ) from error
    images = torch.from_numpy(np.asarray(found.data))
    if images.shape[-1] == 3:  # channels last, as CIFAR's reader has them
        images = images.permute(0, 3, 1, 2)
    labels = found.labels if hasattr(found, "labels") else found.targets
    targets = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return TensorPair(images.float() / 255, targets)


def _download(source: Source, root: Path) -> None:
    # Importing torchvision takes two seconds, and only downloads need it.
    from torchvision import datasets

    parts = ({"split": "train"}, {"split": "test"}) if source.name == "svhn" else ({},)
    try:
        for part in parts:
            getattr(datasets, source.torchvision)(root, download=True, **part)
    except (OSError, RuntimeError) as error:
        raise DataNotFoundError(
            f"data set {source.name!r} could not be downloaded to {root}: {error}. "
            "Without the network, see the error without --allow-download for the "
            "other ways to get it."
        ) from error
