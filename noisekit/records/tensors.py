"""Arrays on disk as safetensors: nothing in such a file can be executed."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from noisekit.core.errors import RunDirectoryError
from noisekit.records.files import write_bytes_atomic

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

_OURS = "noisekit"
_REMEDY = "restore it from a copy"
_UNREADABLE = (
    OSError,
    SafetensorError,
    ValueError,
    struct.error,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)
"""What a file that is not whole raises on the way to its arrays."""


def save_tensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write arrays and texts as one safetensors file, durably and at once.

    A checksum of both is written with them.
    """
    arrays = {
        name: np.require(array, requirements="C") for name, array in tensors.items()
    }
    stated = {
        "sha256": _checksum(arrays, metadata),
        "metadata": dict(sorted(metadata.items())),
        "names": list(arrays),
    }
    # One key, since safetensors writes several in an order that changes.
    header = {_OURS: json.dumps(stated)}
    write_bytes_atomic(path, save(arrays, header))


def load_tensors(
    path: Path, *, ours: bool = False, remedy: str = _REMEDY
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays and texts of ``path``, verified against their checksum.

    Args:
        path: The file.
        ours: Whether the file has to state a checksum; those of other programs are
            read without the check otherwise.
        remedy: What to do where it cannot be read, for the message.

    Raises:
        RunDirectoryError: If the file is missing, cut short or altered.
    """
    try:
        data = path.read_bytes()
        tensors: dict[str, Array] = load(data)
        header = _metadata(data)
        if _OURS not in header and not ours:
            return tensors, header
        stated = json.loads(header[_OURS])
        names, metadata = stated["names"], dict(stated["metadata"])
        digest = stated["sha256"]
        # In the order written, which safetensors does not keep.
        tensors = {name: tensors[name] for name in names}
    except _UNREADABLE as error:
        raise RunDirectoryError(_damaged(path, error, remedy)) from error
    if digest != _checksum(tensors, metadata):
        raise RunDirectoryError(
            f"{path} does not match its checksum, so its content was altered; {remedy}."
        )
    return tensors, metadata


def stated_checksum(path: Path, *, remedy: str = _REMEDY) -> str:
    """Return the checksum that a file of ours states, by its header and size alone.

    Raises:
        RunDirectoryError: If the file is missing, cut short or states none.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size - 8 - length
            if size < 0:
                raise ValueError("it is cut short")
            header = json.loads(file.read(length))
        checksum = str(json.loads(header.pop("__metadata__")[_OURS])["sha256"])
        end = max([0, *(entry["data_offsets"][1] for entry in header.values())])
        if end != size:
            raise ValueError(f"it has {size} bytes of data and needs {end}")
    except _UNREADABLE as error:
        raise RunDirectoryError(_damaged(path, error, remedy)) from error
    return checksum


def _damaged(path: Path, error: Exception, remedy: str) -> str:
    reason = "no checksum" if isinstance(error, KeyError) else error
    return f"{path} needs to be a whole safetensors file, got {reason}; {remedy}."


def _metadata(data: bytes) -> dict[str, str]:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return dict(header.get("__metadata__", {}))


def _checksum(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
