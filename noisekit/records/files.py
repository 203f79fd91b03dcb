"""Files that are either the old ones or the new ones, whatever happens meanwhile."""

import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from noisekit.core.errors import (
    RunDirectoryError,
    RunLockedError,
    StorageError,
    UsageError,
)

_PATIENCE_SECONDS = 0.2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, durably, or leave it as it was."""
    # One name, so that what a kill leaves behind is replaced by the next try.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def write_json_atomic(path: Path, value: object) -> None:
    """Write ``value`` as JSON, durably, or leave the file as it was.

    JSON has no infinity and no NaN: they become the texts ``"inf"``, ``"-inf"`` and
    ``"nan"``, which ``float`` understands.
    """
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes_atomic(path, f"{text}\n".encode())


def plain(value: object) -> object:
    """Return ``value`` in JSON's own types, with non-finite numbers as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def read_json(path: Path, *, remedy: str) -> dict[str, object]:
    """Return the JSON object in ``path``.

    Raises:
        RunDirectoryError: If the file is missing or holds no JSON object; the
            message ends in ``remedy``.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{path} is missing; {remedy}.") from error
    except (OSError, ValueError) as error:
        raise RunDirectoryError(
            f"{path} needs to hold JSON, got a damaged file ({error}); {remedy}."
        ) from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise RunDirectoryError(
            f"{path} needs to hold a JSON object, got a {kind}; {remedy}."
        )
    return value


def exists(path: Path) -> bool:
    """Whether ``path`` is there.

    Raises:
        UsageError: If nothing can be there, as where its name is too long.
    """
    try:
        return path.exists()
    except OSError as error:
        raise UsageError(_no_place(path, error)) from error


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, in which files can be made.

    Raises:
        UsageError: If the file system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(_no_place(path, error)) from error


def _no_place(path: Path, error: OSError) -> str:
    return (
        f"needs a folder that it can make and write to, got {path} "
        f"({error.strerror}); choose another folder, or change its permissions."
    )


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return what to raise when ``path`` cannot be written."""
    reason = error.strerror or str(error)
    advice = (
        "free some space (or raise the quota), then resume"
        if error.errno in _FULL
        else "check the path and its permissions, then resume"
    )
    return StorageError(
        f"cannot write {path}: {reason}. What was durable before is still there; "
        f"{advice}."
    )


@contextmanager
def exclusive_lock(path: Path, *, what: str) -> Iterator[None]:
    """Hold the lock file ``path``, so that ``what`` has one writer.

    The kernel frees the lock when its process ends, however it ends: there is no
    stale lock to clean up, and the file itself stays.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        _take(descriptor, path, what)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock file ``path``; nothing is written."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, since it needs no right to write.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in {errno.EWOULDBLOCK, errno.EACCES}
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int, path: Path, what: str) -> None:
    try:
        _wait_for(descriptor)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 400, 0).decode(errors="replace").strip()
        raise RunLockedError(
            f"{what} needs to have one writer, but {holder or 'another process'} is "
            f"writing to it (lock {path}); wait for it, or end that process."
        ) from error
    except OSError as error:
        raise storage_error(path, error) from error
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
    # A full disk is no reason not to hold the lock: the holder's name is a courtesy.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)


def _wait_for(descriptor: int) -> None:
    """Take the lock; who only asks whether it is free holds it for a moment."""
    last = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > last:
                raise
            time.sleep(0.01)
        else:
            return
