"""Appending rows to a table of a run so that a crash at any byte loses none before."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import pyarrow as pa

from noisekit.core.errors import StorageError, UsageError
from noisekit.records.files import storage_error, sync_directory
from noisekit.records.schema import Table
from noisekit.records.segments import FrameEncoder, encode_batch, segment_path

Cell = bool | int | float | str | None

# Rows share the fixed cost of a frame; a killed process loses at most those of one.
_FLUSH_ROWS = 256
_FLUSH_SECONDS = 2.0


class TableWriter:
    """Appends rows to one segment of a table.

    Rows reach the operating system every 256 rows or 2 seconds, where they survive
    the death of this process; ``flush(durable=True)`` makes them survive a power
    failure as well. A batch of rows is written whole or not at all: where the disk
    is full the segment is cut back to its last whole batch, and the rows stay here,
    so that a later ``flush`` can try again.

    Attributes:
        number: Of the segment that is written.
        num_rows: Rows of the table so far, those of earlier segments included.
    """

    def __init__(
        self, run: Path, table: Table, *, run_id: str, number: int, first_row: int
    ) -> None:
        self._table = table
        self.number = number
        self._names = frozenset(column.name for column in table.columns)
        self._schema = table.schema
        self._path = segment_path(run, table, number)
        self._pending: list[Mapping[str, Cell]] = []
        self._flushed_at = time.monotonic()
        self._size = 0  # bytes of whole frames
        self._durable_size = 0  # of those, bytes known to be on the disk
        self.num_rows = first_row
        self._frames = FrameEncoder()
        header = self._frames.header(
            run_id=run_id, table=table, number=number, first_row=first_row
        )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # O_EXCL: a second writer of the same segment would interleave its frames.
            self._file = os.open(
                self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644
            )
        except OSError as error:
            raise storage_error(self._path, error) from error
        try:
            self._write(header)
            # A new file survives a power failure only once its directory entry does.
            sync_directory(self._path.parent)
        except StorageError:
            self.close()
            raise

    def append(self, row: Mapping[str, Cell]) -> None:
        """Add one row; columns that it lacks stay empty."""
        self._accept(row)
        late = time.monotonic() - self._flushed_at > _FLUSH_SECONDS
        if late or len(self._pending) >= _FLUSH_ROWS:
            self.flush()

    def append_together(self, rows: Iterable[Mapping[str, Cell]]) -> None:
        """Add rows atomically and durably: a reader gets all or none."""
        self.flush()
        for row in rows:
            self._accept(row)
        self.flush(durable=True)

    def flush(self, *, durable: bool = False) -> int:
        """Write pending rows and return the number of rows of the table.

        Args:
            durable: Also wait for ``fsync``.

        Raises:
            UsageError: If a row has a value of the wrong type.
        """
        if self._pending:
            try:
                payload = encode_batch(self._pending, self._schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise UsageError(
                    f"table {self._table.name!r} needs values of its columns' types: "
                    f"{error}."
                ) from error
            self._write(self._frames.frame(payload))
            self._pending = []
        self._flushed_at = time.monotonic()
        if durable and self._durable_size < self._size:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise storage_error(self._path, error) from error
            self._durable_size = self._size
        return self.num_rows

    def close(self) -> None:
        """Close the file; pending rows are not written."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Flush unless an exception is propagating, and close."""
        try:
            if kind is None:
                self.flush(durable=True)
        finally:
            self.close()

    def _accept(self, row: Mapping[str, Cell]) -> None:
        if not row.keys() <= self._names:
            unknown = ", ".join(sorted(row.keys() - self._names))
            raise UsageError(
                f"table {self._table.name!r} needs columns of its schema, got "
                f"{unknown}; add them to noisekit.records.schema."
            )
        self._pending.append(row)
        self.num_rows += 1

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        written = 0
        try:
            # os.write may be short, as on a nearly full disk or after a signal.
            while written < len(view):
                written += os.write(self._file, view[written:])
        except OSError as error:
            # Back to the last whole frame: a reader stops at the first torn one, and
            # would not see frames written after it.
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise storage_error(self._path, error) from error
        self._size += written
        # Only now does the next checksum chain to this frame; a failed one is retried.
        self._frames.commit()
