"""Arrays on disk, whole and unaltered or refused."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from noisekit.core.errors import RunDirectoryError
from noisekit.records import load_tensors, save_tensors

ARRAYS = {
    "weight": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
    "scalar": np.array(3.5),
    "counts": np.array([1, 2], dtype=np.int64),
    "turned": np.arange(6.0).reshape(2, 3).T,
    "none": np.zeros((0, 4), dtype=np.float32),
}


def test_arrays_and_texts_come_back(tmp_path: Path) -> None:
    """Bits, shapes, types and metadata are those that were written.

    Catches: strided arrays written in memory order; names in another order; the
    checksum left in the texts.
    """
    path = tmp_path / "new" / "x.safetensors"
    save_tensors(path, ARRAYS, {"step": "3"})
    found, metadata = load_tensors(path)
    assert metadata == {"step": "3"}
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """Catches: metadata in an order that changes from write to write."""
    texts = {str(i): "x" for i in range(20)}
    first, second = tmp_path / "a", tmp_path / "b"
    save_tensors(first, ARRAYS, texts)
    save_tensors(second, ARRAYS, dict(reversed(texts.items())))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("place", [-1, -40])
def test_an_altered_file_is_refused(tmp_path: Path, place: int) -> None:
    """One bit anywhere in the data is noticed.

    Catches: a checksum of the header only, or none.
    """
    path = tmp_path / "x.safetensors"
    save_tensors(path, ARRAYS, {"step": "3"})
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RunDirectoryError, match="does not match its checksum"):
        load_tensors(path)


def test_altered_texts_are_refused(tmp_path: Path) -> None:
    """Catches: a checksum that leaves the metadata out."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, ARRAYS, {"step": "3"})
    before = path.read_bytes()
    path.write_bytes(before.replace(b'step\\": \\"3', b'step\\": \\"4'))
    assert path.read_bytes() != before
    with pytest.raises(RunDirectoryError, match="does not match its checksum"):
        load_tensors(path)


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_a_cut_file_is_refused(tmp_path: Path, size: int) -> None:
    """Catches: library errors that say nothing of the file or the remedy."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, ARRAYS, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunDirectoryError, match="needs to be a whole safetensors file"):
        load_tensors(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Catches: a bare FileNotFoundError."""
    with pytest.raises(RunDirectoryError, match=r"x\.safetensors needs to be a whole"):
        load_tensors(tmp_path / "x.safetensors")


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    """Catches: demanding a checksum that only this package writes."""
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(2)}, path)
    found, metadata = load_tensors(path)
    np.testing.assert_array_equal(found["a"], np.ones(2))
    assert metadata == {}
