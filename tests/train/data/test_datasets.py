"""Data sets: what is read, how it is split, and what is refused."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from noisekit.core.errors import DataFileError, DataNotFoundError, UsageError
from noisekit.train.data import datasets, sources
from noisekit.train.data.datasets import load_data
from noisekit.train.data.embedded import Digits, Gaussian
from noisekit.train.data.files import Cifar10, FashionMnist, Mnist
from noisekit.train.data.idx import read_idx
from noisekit.train.data.section import DataSection

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
DIGITS = Digits(train=1024, validation=233, test=540)


def idx(array: np.ndarray) -> bytes:
    """Write an IDX file as its publishers describe it."""
    header = struct.pack(">HBB", 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Make a folder of forty training and twenty test images that tell their place."""
    for part, count in (("train", 40), ("test", 20)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        image_name, label_name = NAMES[part]
        (tmp_path / f"{image_name}.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / label_name.replace("-idx", ".idx")).write_bytes(idx(labels))
    return tmp_path


def mnist_spec(path: Path, **keys: int) -> Mnist:
    sizes = {"train": 20, "validation": 10, "test": 10} | keys
    return Mnist(path=str(path), normalise="none", **sizes)


def test_digits_split_is_disjoint_and_complete() -> None:
    """Each of the 1,797 scans is in one split, once.

    Catches: overlap of training and test; a scan that is lost.
    """
    data = load_data(DIGITS.model_copy(update={"normalise": "none"}))
    assert [len(data.train), len(data.validation), len(data.test)] == [1024, 233, 540]
    assert data.input_shape == (1, 8, 8)
    parts = (data.train, data.validation, data.test)
    rows = torch.cat([part.inputs.flatten(1) for part in parts])
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    assert torch.equal(_sorted(rows), _sorted(images))


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    return rows[np.lexsort(rows.numpy().T)]


def test_split_keeps_the_shares_of_the_classes() -> None:
    """Each class has its share of each split, to within one or two examples.

    Catches: a plain random split, whose counts differ by ten and more.
    """
    data = load_data(DIGITS)
    counts = {
        name: torch.bincount(part.targets, minlength=10).double()
        for name, part in data.items()
    }
    share = sum(counts.values()) / 1797
    for name, part in data.items():
        assert (counts[name] - len(part) * share).abs().max() < 2, name


def test_test_set_stays_when_training_set_shrinks() -> None:
    """Test examples are the same ones in every profile of a recipe.

    Catches: drawing the training examples first.
    """
    small = DIGITS.model_copy(update={"train": 64, "normalise": "none"})
    large = DIGITS.model_copy(update={"normalise": "none"})
    assert torch.equal(load_data(small).test.inputs, load_data(large).test.inputs)
    assert torch.equal(
        load_data(small).validation.inputs, load_data(large).validation.inputs
    )


def test_split_seed_decides_the_split() -> None:
    """The same seed gives the same bits, another one another split and digest."""
    datasets._load.cache_clear()
    first = load_data(DIGITS)
    datasets._load.cache_clear()
    again = load_data(DIGITS)
    other = load_data(DIGITS.model_copy(update={"split_seed": 1}))
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert first.sha256 == again.sha256
    assert not torch.equal(first.test.targets, other.test.targets)
    assert first.sha256 != other.sha256


def test_standardising_looks_at_training_examples_only() -> None:
    """Training inputs have mean 0 and deviation 1; the others need not.

    Catches: standardising each split by itself, or all of them together.
    """
    raw = load_data(DIGITS.model_copy(update={"normalise": "none"}))
    data = load_data(DIGITS)
    deviation, mean = torch.std_mean(raw.train.inputs)
    for (name, part), (_, before) in zip(data.items(), raw.items(), strict=True):
        expected = (before.inputs - mean) / deviation
        torch.testing.assert_close(part.inputs, expected, rtol=1e-5, atol=1e-5)
        assert (abs(part.inputs.mean().item()) < 1e-6) == (name == "train")


def test_idx_files_are_read_as_published(mnist: Path) -> None:
    """Images stay with their labels; training and test files are not mixed.

    Catches: reading sizes in the machine's byte order; exchanging the files.
    """
    data = load_data(mnist_spec(mnist))
    assert data.input_shape == (1, 28, 28)
    assert data.origin == str(mnist)
    place = {name: part.inputs[:, 0, 0, 0] * 255 for name, part in data.items()}
    for name, part in data.items():
        assert torch.equal(place[name].round().long() % 10, part.targets)
        assert torch.equal(
            torch.bincount(part.targets), torch.full((10,), len(part) // 10)
        )
    assert place["test"].max() < 20
    assert not set(place["train"].tolist()) & set(place["validation"].tolist())


def test_fashion_mnist_is_the_published_one(mnist: Path) -> None:
    """Files of the right shape and other contents are refused.

    Catches: training on MNIST under the name of Fashion-MNIST.
    """
    spec = mnist_spec(mnist).model_copy(update={"name": "fashion-mnist"})
    with pytest.raises(DataFileError, match=r"SHA-256 c59f468a.*, got .*get it again"):
        load_data(spec)


def test_gaussian_has_the_stated_noise() -> None:
    """About its class's mean, each feature has the stated deviation.

    A standard error is 0.9 %; four are allowed.

    Catches: variance taken for deviation.
    """
    spec = Gaussian(
        train=4000,
        validation=50,
        test=50,
        num_features=5,
        num_classes=3,
        noise=0.25,
        normalise="none",
    )
    data = load_data(spec)
    assert data.num_classes == 3
    for label in range(3):
        inputs = data.train.inputs[data.train.targets == label]
        assert inputs.std(dim=0).mean().item() == pytest.approx(0.25, rel=0.036)
        assert inputs.mean(dim=0).norm().item() == pytest.approx(1.0, abs=0.05)


def test_cifar10_binary_records_are_read(tmp_path: Path) -> None:
    """A record is a label and three planes; batches 1 to 5 train, one tests.

    Catches: channels last; the test batch among the training batches.
    """
    for number, name in enumerate(
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    ):
        records = np.zeros((10, 3073), np.uint8)
        records[:, 0] = np.arange(10)
        records[:, 1] = number
        records[:, 1 + 1024] = 100 + number
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    spec = Cifar10(
        train=40,
        validation=10,
        test=10,
        path=str(tmp_path),
        normalise="none",
    )
    data = load_data(spec)
    assert data.input_shape == (3, 32, 32)
    seen = (data.train.inputs[:, :2, 0, 0] * 255).round()
    assert torch.equal(seen[:, 1], seen[:, 0] + 100)
    assert set(seen[:, 0].tolist()) <= {0, 1, 2, 3, 4}
    assert set((data.test.inputs[:, 0, 0, 0] * 255).round().tolist()) == {5}
    (tmp_path / "test_batch.bin").write_bytes(b"123")
    datasets._load.cache_clear()
    with pytest.raises(
        DataFileError, match=r"whole records of 3073 bytes, got 3 bytes"
    ):
        load_data(spec)


def test_missing_data_lists_the_ways_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says where was looked and every way there is.

    Catches: asking the network without being told to.
    """
    monkeypatch.setenv("NOISEKIT_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "_DEBIAN", tmp_path / "nowhere")
    spec = FashionMnist(train=10, validation=10, test=10)
    with pytest.raises(DataNotFoundError) as caught:
        load_data(spec)
    message = str(caught.value)
    for text in (
        f"found in none of {tmp_path}/fashion-mnist, {tmp_path}/FashionMNIST/raw",
        "apt-get install dataset-fashion-mnist",
        "put train-images-idx3-ubyte, train-labels-idx1-ubyte",
        "data.path in the recipe",
        "NOISEKIT_DATA",
        "--allow-download",
    ):
        assert text in message, text


def test_given_path_is_the_only_place(mnist: Path, tmp_path: Path) -> None:
    """A wrong path is refused, though the data lie elsewhere on the machine.

    Catches: silently reading other files than those that were named.
    """
    with pytest.raises(DataNotFoundError, match=r"found in none of .*/empty"):
        load_data(mnist_spec(tmp_path / "empty"))


def test_download_happens_only_on_demand(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``allow_download`` the data are fetched once, then found.

    Catches: looking no second time; fetching what is there.
    """
    fetched = []

    def fetch(source: sources.Source, root: Path) -> None:
        fetched.append((source.torchvision, root))
        (root / "MNIST").mkdir(parents=True)
        mnist_files = [path for path in mnist.iterdir() if path.is_file()]
        (root / "MNIST" / "raw").mkdir()
        for path in mnist_files:
            (root / "MNIST" / "raw" / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(sources, "_download", fetch)
    spec = mnist_spec(tmp_path / "new")
    assert len(load_data(spec, allow_download=True).train) == 20
    assert len(load_data(spec).train) == 20
    assert fetched == [("MNIST", tmp_path / "new")]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            DIGITS.model_copy(update={"train": 1025}),
            "data.train, data.validation and data.test need at most 1797 examples of "
            "digits together, got 1798; ask for fewer",
        ),
    ],
)
def test_more_examples_than_there_are_is_refused(spec: DataSection, said: str) -> None:
    """Sizes add up against what the data set has."""
    with pytest.raises(UsageError, match=said):
        load_data(spec)


def test_more_test_examples_than_there_are_is_refused(mnist: Path) -> None:
    """A data set with a test set of its own is checked in both parts."""
    with pytest.raises(
        UsageError, match=r"data.test need at most 20 examples .* got 21"
    ):
        load_data(mnist_spec(mnist, test=21))
    with pytest.raises(
        UsageError, match=r"data.train and data.validation need at .* 40"
    ):
        load_data(mnist_spec(mnist, train=31))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "got one that begins with nothing"),
        (b"\x89PNG....", "unsigned bytes, got one that begins with 89504e47"),
        (idx(np.zeros((3, 2), np.uint8))[:-1], r"needs 18 bytes .*\(3, 2\), got 17"),
        (idx(np.zeros((3, 2), np.uint8)) + b"x", "needs 18 bytes .* got 19"),
        (
            gzip.compress(idx(np.zeros((3, 2), np.uint8)), mtime=0)[:-9],
            "readable IDX file",
        ),
    ],
    ids=["empty", "another format", "cut short", "too long", "cut archive"],
)
def test_damaged_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    """What is cut short, too long or something else is not read as data.

    Catches: reading as many bytes as there are.
    """
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=said):
        read_idx(path)
