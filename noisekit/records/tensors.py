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


def load_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays and texts of ``path``, verified against their checksum.

    Files of other programs, which state no checksum, are read without the check.

    Raises:
        RunDirectoryError: If the file is missing, cut short or altered.
    """
    try:
        data = path.read_bytes()
        tensors: dict[str, Array] = load(data)
        header = _header(data)
        if _OURS not in header:
            return tensors, header
        stated = json.loads(header[_OURS])
        names, metadata = stated["names"], dict(stated["metadata"])
        digest = stated["sha256"]
    except (OSError, SafetensorError, ValueError, struct.error, KeyError) as error:
        raise RunDirectoryError(
            f"{path} needs to be a whole safetensors file, got {error}; "
            "remove it and resume the run."
        ) from error
    if digest != _checksum(tensors, metadata):
        raise RunDirectoryError(
            f"{path} does not match its checksum, so its content was altered; "
            "remove it and resume the run."
        )
    # In the order written, which safetensors does not keep.
    return {name: tensors[name] for name in names}, metadata


def _header(data: bytes) -> dict[str, str]:
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
