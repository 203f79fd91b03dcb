"""Read the files that MNIST and its kin come in: IDX, packed by gzip or not."""

import gzip
import hashlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from noisekit.core.errors import DataFileError

_UNSIGNED_BYTE = 0x08
_GZIP = b"\x1f\x8b"


def read_idx(path: Path, *, sha256: str | None = None) -> NDArray[np.uint8]:
    """Return the array in an IDX file of unsigned bytes.

    Args:
        path: The file; whether it is packed shows in its first bytes.
        sha256: Digest that the unpacked file needs to have.

    Raises:
        DataFileError: If the file is damaged, or another one than it should be.
    """
    content = _unpacked(path)
    shape = _shape(content, path)
    offset = 4 + 4 * len(shape)
    expected = offset + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataFileError(
            f"{path} needs {expected} bytes for an array of shape {shape}, got "
            f"{len(content)}; it is damaged, get it again."
        )
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise DataFileError(
            f"{path} needs to be the published file with SHA-256 {sha256}, got "
            f"{digest}; get it again."
        )
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)


def find_files(folder: Path, names: Mapping[str, str]) -> dict[str, Path] | None:
    """Return each file of ``names`` in ``folder``, or ``None`` if one is missing.

    Both spellings in use are looked for, ``x-idx3-ubyte`` and ``x.idx3-ubyte``, each
    with and without ``.gz``.
    """
    found = {}
    for key, name in names.items():
        there = [path for path in _spellings(folder, name) if path.is_file()]
        if not there:
            return None
        found[key] = there[0]
    return found


def _spellings(folder: Path, name: str) -> Iterator[Path]:
    for spelling in (name, name.replace("-idx", ".idx")):
        yield folder / spelling
        yield folder / f"{spelling}.gz"


def _unpacked(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP) else content
    except (OSError, EOFError) as error:
        raise DataFileError(
            f"{path} needs to be a readable IDX file: {error}; get it again."
        ) from error


def _shape(content: bytes, path: Path) -> tuple[int, ...]:
    """Return the shape that the header states: a magic number, then the sizes."""
    if (
        len(content) >= 4
        and content[:2] == b"\x00\x00"
        and content[2] == _UNSIGNED_BYTE
    ):
        rank = content[3]
        if len(content) >= 4 + 4 * rank:
            return struct.unpack_from(f">{rank}I", content, offset=4)
    raise DataFileError(
        f"{path} needs to be an IDX file of unsigned bytes, got one that begins with "
        f"{content[:4].hex() or 'nothing'}; get it again."
    )
