"""How a table lies on disk while it grows, and what of it can be read.

Every process that writes a table begins a new segment, an Arrow stream, which states
the row of the table that it starts at. Rows of earlier segments from there on are
superseded: the process resumed before them and wrote them again. Sealing turns all
segments into one Parquet file, which states the last segment that it holds.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from noisekit.core.errors import NewerFormatError
from noisekit.records.schema import (
    FIRST_ROW_KEY,
    FORMAT,
    FORMAT_KEY,
    LAST_SEGMENT_KEY,
    Table,
)

_SEGMENT = re.compile(r"(?P<table>[a-z]+)-(?P<number>\d{4,})\.arrow")
_UNREADABLE = (pa.ArrowInvalid, pa.ArrowSerializationError, OSError, EOFError)


@dataclass(frozen=True, slots=True)
class StoredTable:
    """What can be read of one table.

    Attributes:
        rows: The rows, in the order written.
        fault: What could not be read, in words.
        last_segment: Number of the newest segment, 0 where there is none.
    """

    rows: pa.Table
    fault: str | None
    last_segment: int


@dataclass(frozen=True, slots=True)
class _Segment:
    first_row: int | None
    rows: pa.Table
    fault: str | None


def segment_path(run: Path, table: Table, number: int) -> Path:
    """Return where segment ``number`` of ``table`` lies."""
    return run / "segments" / f"{table.name}-{number:04d}.arrow"


def sealed_path(run: Path, table: Table) -> Path:
    """Return where the sealed table lies."""
    return run / f"{table.name}.parquet"


def segment_numbers(run: Path, table: Table) -> list[int]:
    """Return the numbers of the segments of ``table``, oldest first."""
    found = (_SEGMENT.fullmatch(path.name) for path in (run / "segments").glob("*"))
    return sorted(
        int(match["number"])
        for match in found
        if match and match["table"] == table.name
    )


def read_table(run: Path, table: Table) -> StoredTable:
    """Return the rows of ``table``: sealed ones, then those of newer segments.

    Reading needs no lock and may go on while the table is written or sealed.
    """
    while True:
        try:
            return _read_once(run, table)
        except FileNotFoundError:
            # Sealed between listing and reading; what was listed is in Parquet now.
            continue


def _read_once(run: Path, table: Table) -> StoredTable:
    numbers = segment_numbers(run, table)
    rows, last = _read_sealed(sealed_path(run, table), table)
    fault = None
    for number in numbers:
        if number <= last:
            continue
        path = segment_path(run, table, number)
        segment = _read_segment(path, table)
        if segment.first_row is None:
            fault = fault or segment.fault
            continue
        if segment.first_row > rows.num_rows:
            fault = (
                f"{path.name} starts at row {segment.first_row}, but only "
                f"{rows.num_rows} rows before it can be read; it is left out"
            )
            break
        rows = pa.concat_tables([rows.slice(0, segment.first_row), segment.rows])
        # An earlier tear is made good where a later segment goes on without a gap.
        fault = segment.fault
    return StoredTable(rows, fault, max([last, *numbers]))


def _read_sealed(path: Path, table: Table) -> tuple[pa.Table, int]:
    if not path.exists():
        return table.schema.empty_table(), 0
    rows = pq.read_table(pa.BufferReader(path.read_bytes()))
    metadata = rows.schema.metadata or {}
    _refuse_newer(path, metadata)
    return _conform(rows, table), int(metadata.get(LAST_SEGMENT_KEY, b"0"))


def _read_segment(path: Path, table: Table) -> _Segment:
    """Read up to the first batch that is torn."""
    data = path.read_bytes()
    empty = table.schema.empty_table()
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(data))
    except _UNREADABLE:
        return _Segment(None, empty, f"{path.name} is torn before its first row")
    metadata = reader.schema.metadata or {}
    _refuse_newer(path, metadata)
    batches: list[pa.RecordBatch] = []
    fault = None
    try:
        for batch in reader:
            batch.validate(full=True)
            batches.append(batch)
    except _UNREADABLE:
        kept = sum(batch.num_rows for batch in batches)
        fault = f"{path.name} is torn after {kept} rows, which are kept"
    rows = _conform(pa.Table.from_batches(batches, reader.schema), table)
    return _Segment(int(metadata.get(FIRST_ROW_KEY, b"0")), rows, fault)


def _conform(rows: pa.Table, table: Table) -> pa.Table:
    """Return ``rows`` in today's columns; older files may lack some."""
    columns = []
    for field in table.schema:
        if field.name in rows.column_names:
            columns.append(rows.column(field.name).cast(field.type))
        else:
            columns.append(pa.chunked_array([pa.nulls(rows.num_rows, field.type)]))
    return pa.Table.from_arrays(columns, schema=table.schema)


def _refuse_newer(path: Path, metadata: dict[bytes, bytes]) -> None:
    written = int(metadata.get(FORMAT_KEY, b"0"))
    if written > FORMAT:
        raise NewerFormatError(newer_format(path, written))


def newer_format(path: Path, written: int) -> str:
    """Return what to say of a file that a newer noisekit wrote."""
    return (
        f"{path} has format {written}, but this noisekit reads up to format {FORMAT}; "
        "update noisekit (pip install --upgrade noisekit)."
    )
