"""A table on disk: a sealed Parquet file, then the segments written after it.

Every process that writes a table begins a new segment, which states the row of the
table that it starts at. Rows of earlier segments from there on are superseded: the
process resumed before them and wrote them again. Sealing turns all segments into one
Parquet file, which states the last segment that it holds; its digest is in the run's
manifest.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from noisekit.core.errors import NewerFormatError
from noisekit.records.integrity import digest_of, newer_format
from noisekit.records.schema import FORMAT, FORMAT_KEY, LAST_SEGMENT_KEY, Table
from noisekit.records.segments import (
    UNREADABLE,
    known_columns,
    read_segment,
    segments_of,
)

RESTORE = (
    "restore it from a copy, or delete the run's directory and resume to run it again"
)
"""The way out where a file of a run is lost."""

_TRIES = 100


@dataclass(frozen=True, slots=True)
class StoredTable:
    """What can be read of one table.

    Attributes:
        table: The table.
        sparse: The rows, in the order written; columns without a value may lack.
        fault: What could not be read, in words.
        last_segment: Number of the newest segment, 0 where there is none.
        sealed_through: Number of the last segment that the Parquet file holds.
        sealed_lost: Whether the Parquet file is missing or is not what was sealed.
    """

    table: Table
    sparse: pa.Table
    fault: str | None
    last_segment: int
    sealed_through: int = 0
    sealed_lost: bool = False

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.sparse.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column."""
        if name in self.sparse.column_names:
            return self.sparse.column(name)
        return pa.chunked_array([pa.nulls(self.num_rows, self.table.types[name])])

    @property
    def rows(self) -> pa.Table:
        """The rows in all of the table's columns."""
        return conform(self.sparse, self.table)


@dataclass(frozen=True, slots=True)
class _Sealed:
    rows: pa.Table
    last_segment: int = 0
    fault: str | None = None
    lost: bool = False


def sealed_path(run: Path, table: Table) -> Path:
    """Return where the sealed table is."""
    return run / f"{table.name}.parquet"


def pending_path(run: Path, table: Table) -> Path:
    """Return where a table is while its digest is on the way into the manifest."""
    return run / f".{table.name}.parquet.sealing"


def encode_sealed(stored: StoredTable) -> bytes:
    """Return the rows as a Parquet file, without columns that have no value."""
    rows = stored.rows
    used = [name for name in rows.column_names if rows[name].null_count < len(rows)]
    metadata = {FORMAT_KEY: str(FORMAT), LAST_SEGMENT_KEY: str(stored.last_segment)}
    sink = pa.BufferOutputStream()
    kept = rows.select(used or rows.column_names[:1]).replace_schema_metadata(metadata)
    pq.write_table(kept, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def conform(rows: pa.Table, table: Table) -> pa.Table:
    """Return ``rows`` in today's columns; those that are missing are empty."""
    columns = [
        rows.column(field.name)
        if field.name in rows.column_names
        else pa.chunked_array([pa.nulls(rows.num_rows, field.type)])
        for field in table.schema
    ]
    return pa.Table.from_arrays(columns, schema=table.schema)


def joined(parts: Iterable[pa.Table]) -> pa.Table:
    """Return tables below each other; a column that a part lacks is empty there."""
    return pa.concat_tables(parts, promote_options="default")


def read_table(
    run: Path,
    table: Table,
    *,
    run_id: str,
    digests: Mapping[str, str] | None,
    columns: Sequence[str] | None = None,
    last_segment: int = 0,
) -> StoredTable:
    """Return the rows of ``table``: sealed ones, then those of newer segments.

    Reading needs no lock and may go on while the table is written or sealed.

    Args:
        run: The run's directory.
        table: The table.
        run_id: The run, which each segment has to name.
        digests: Of the run's sealed files; ``None`` where they are not known, and
            files are read unverified.
        columns: Columns to decode of the sealed file; all by default.
        last_segment: Number of the last segment that was begun, as far as is known.
    """
    for _ in range(_TRIES):
        # Sealed between listing and reading, what was listed is in Parquet now.
        with suppress(FileNotFoundError):
            stored = _read_once(run, table, run_id, digests, columns)
            return _with_lost_segments(stored, last_segment)
    fault = f"segments of {table.name} are listed but cannot be found; {RESTORE}"
    return StoredTable(table, pa.table({}), fault, 0, sealed_lost=True)


def _with_lost_segments(stored: StoredTable, last_segment: int) -> StoredTable:
    """Say that the end of a table is lost where its last segment is not there."""
    if stored.fault or stored.last_segment >= last_segment:
        return stored
    fault = (
        f"segment {last_segment} of {stored.table.name} is missing, so that rows after "
        f"the first {stored.num_rows} may be lost; {RESTORE}"
    )
    return replace(stored, fault=fault)


def sealed_fault(run: Path, table: Table, digests: Mapping[str, str]) -> str | None:
    """Return what is wrong with a table's sealed file, without decoding it."""
    data = _sealed_bytes(run, table, digests)
    return data if isinstance(data, str) else None


def _read_once(
    run: Path,
    table: Table,
    run_id: str,
    digests: Mapping[str, str] | None,
    columns: Sequence[str] | None,
) -> StoredTable:
    segments = segments_of(run, table)
    sealed = _read_sealed(run, table, digests, columns)
    rows, fault = sealed.rows, sealed.fault
    for number, path in segments.items():
        if number <= sealed.last_segment:
            continue
        segment = read_segment(path, table, run_id=run_id)
        if segment.first_row is None:
            fault = fault or segment.fault
            continue
        if segment.first_row > rows.num_rows:
            fault = fault or (
                f"{path.name} starts at row {segment.first_row}, but only "
                f"{rows.num_rows} rows before it can be read; it is left out"
            )
            break
        rows = joined([rows.slice(0, segment.first_row), *segment.batches])
        # An earlier tear is made good where a later segment goes on without a gap.
        fault = sealed.fault or segment.fault
    last = max([sealed.last_segment, *segments])
    return StoredTable(
        table,
        rows,
        fault,
        last_segment=last,
        sealed_through=sealed.last_segment,
        sealed_lost=sealed.lost,
    )


def _read_sealed(
    run: Path,
    table: Table,
    digests: Mapping[str, str] | None,
    columns: Sequence[str] | None,
) -> _Sealed:
    empty = pa.table({})
    data = _sealed_bytes(run, table, digests)
    if not isinstance(data, bytes):
        return _Sealed(empty, fault=data, lost=data is not None)
    path = sealed_path(run, table)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        rows = file.read(columns=columns, use_threads=False)
        if digests is None:
            rows.validate(full=True)
        metadata = file.schema_arrow.metadata or {}
        written = int(metadata.get(FORMAT_KEY, b"0"))
        last_segment = int(metadata.get(LAST_SEGMENT_KEY, b"0"))
        rows = known_columns(rows, table)
    except UNREADABLE:
        return _Sealed(empty, fault=_left_out(path, "is damaged"), lost=True)
    if written > FORMAT:
        raise NewerFormatError(newer_format(path, written))
    return _Sealed(rows, last_segment)


def _sealed_bytes(
    run: Path, table: Table, digests: Mapping[str, str] | None
) -> bytes | str | None:
    """Return the sealed file, what is wrong with it, or ``None`` if there is none."""
    path = sealed_path(run, table)
    if digests is None:
        return path.read_bytes() if path.exists() else None
    if path.name not in digests:
        known = "is not a file that the run sealed"
        return _left_out(path, known) if path.exists() else None
    wrong = "is missing"
    for place in (path, pending_path(run, table)):
        try:
            data = place.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
            continue
        if digest_of(data) == digests[path.name]:
            return data
        wrong = "does not match its digest in the manifest"
    return _left_out(path, wrong)


def _left_out(path: Path, wrong: str) -> str:
    return f"{path.name} {wrong}, so its rows are left out; {RESTORE}"
