"""Digests that show whether a file is still what was written.

SHA-256 throughout: with the processor's own instructions it is the fastest of the
standard library's (1.4 GB/s on one core, BLAKE2b 0.5 GB/s).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noisekit.core.errors import NewerFormatError, RunDirectoryError
from noisekit.records.schema import FORMAT

_SIGNED_SINCE = 2

DIGEST_KEY = "digest"
"""Key of a JSON object's own digest; it covers everything else in the object."""


def digest_of(data: "bytes | memoryview") -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def signed(content: Mapping[str, Any]) -> dict[str, Any]:  # Any: JSON
    """Return a JSON object with its own digest."""
    return {**content, DIGEST_KEY: _object_digest(content)}


def is_altered(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is not what ``signed`` returned; one without digest is."""
    return content.get(DIGEST_KEY) != _object_digest(content)


def _object_digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != DIGEST_KEY}
    return digest_of(json.dumps(rest, sort_keys=True).encode())


def check_object(path: Path, content: Mapping[str, Any], *, remedy: str) -> None:
    """Refuse a JSON object that is not as it was written, or that is too new.

    Format 1 had no digests; such an object passes.

    Raises:
        NewerFormatError: If a newer noisekit wrote it.
        RunDirectoryError: If it was altered since; the message ends in ``remedy``.
    """
    written = content.get("format")
    number = written if isinstance(written, int) else FORMAT
    unsigned = DIGEST_KEY not in content
    if number > FORMAT and (unsigned or not is_altered(content)):
        raise NewerFormatError(newer_format(path, number))
    if is_altered(content) and not (unsigned and number < _SIGNED_SINCE):
        raise RunDirectoryError(
            f"{path} needs to be as it was written, but was altered since (it does not "
            f"match its digest); {remedy}."
        )


def newer_format(path: Path, written: int) -> str:
    """Return the message for a file that a newer noisekit wrote."""
    return (
        f"{path} has format {written}, but this noisekit reads up to format {FORMAT}; "
        "update noisekit (pip install --upgrade noisekit)."
    )
