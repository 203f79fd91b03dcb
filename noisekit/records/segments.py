"""Segments: append-only files of row batches, each batch with a checksum.

A segment is a magic line and then frames ``length | checksum | payload``. The first
payload is a JSON header: format, run, table, and the row of the table at which the
segment starts. Each later payload is an Arrow stream of one batch, with only those
columns that have a value in it. A checksum is the SHA-256 of the checksum before it
and of its own payload, so that a frame that was altered, moved, dropped or taken from
another segment is noticed at that frame.

Segments of format 1 are plain Arrow streams (``.arrow``), which are still read.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from noisekit.core.errors import NewerFormatError
from noisekit.records.integrity import newer_format
from noisekit.records.schema import FIRST_ROW_KEY, FORMAT, FORMAT_KEY, Table

MAGIC = b"noisekit segment\n"
_LENGTH = struct.Struct("<I")
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_NAME = re.compile(r"(?P<table>[a-z]+)-(?P<number>\d{4,})\.(segment|arrow)")
UNREADABLE = (pa.ArrowException, OSError, EOFError, ValueError, OverflowError)
"""What pyarrow raises on bytes that are not what they should be."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What can be read of one segment.

    Attributes:
        first_row: Row of the table that it starts at; ``None`` where the header
            cannot be read.
        batches: Its whole batches, in order, in the columns of the table.
        fault: Why what follows them cannot be read, in words.
    """

    first_row: int | None
    batches: list[pa.Table]
    fault: str | None


class FrameEncoder:
    """Makes the frames of one segment, one after the other."""

    def __init__(self) -> None:
        self._previous = self._next = b""

    def header(
        self, *, run_id: str, table: Table, number: int, first_row: int
    ) -> bytes:
        """Return the beginning of a segment's file."""
        facts = {
            "format": FORMAT,
            "run_id": run_id,
            "table": table.name,
            "number": number,
            "first_row": first_row,
        }
        return MAGIC + self.frame(json.dumps(facts).encode())

    def frame(self, payload: bytes) -> bytes:
        """Return ``payload`` as the frame that follows the last one committed."""
        self._next = _checksum(self._previous, payload)
        return _LENGTH.pack(len(payload)) + self._next + payload

    def commit(self) -> None:
        """Chain the next checksum to the last frame, which has been written."""
        self._previous = self._next


def encode_batch(rows: Sequence[Mapping[str, object]], schema: pa.Schema) -> bytes:
    """Return rows as an Arrow stream of the columns that have a value in them.

    Most cells of the steps table are empty: 112 columns cost 885 bytes a row, those
    of a typical reading a fifth of that.
    """
    used = {name for row in rows for name, cell in row.items() if cell is not None}
    # One column at least, since an Arrow batch has its number of rows from there.
    fields = [field for field in schema if field.name in used] or [schema.field(0)]
    sparse = pa.schema([pa.field(field.name, field.type) for field in fields])
    batch = pa.RecordBatch.from_pylist(rows, schema=sparse)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, sparse) as stream:
        stream.write_batch(batch)
    payload: bytes = sink.getvalue().to_pybytes()
    return payload


def segment_path(run: Path, table: Table, number: int) -> Path:
    """Return where segment ``number`` of ``table`` is written."""
    return run / "segments" / f"{table.name}-{number:04d}.segment"


def segments_of(run: Path, table: Table) -> dict[int, Path]:
    """Return the segments of ``table`` by number, oldest first."""
    result = {
        int(match["number"]): path
        for path in (run / "segments").glob("*")
        if (match := _NAME.fullmatch(path.name)) and match["table"] == table.name
    }
    return dict(sorted(result.items()))


def read_segment(path: Path, table: Table, *, run_id: str) -> Segment:
    """Read a segment up to the first frame that is not whole.

    Raises:
        NewerFormatError: If a newer noisekit wrote it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        return Segment(None, [], f"{path.name} cannot be read: {error.strerror}")
    if path.suffix == ".arrow":
        return _read_stream(path, data, table)
    frames = _frames(data)
    first_row = _first_row(path, next(frames), table, run_id)
    if isinstance(first_row, str):
        return Segment(None, [], f"{path.name} is {first_row}")
    batches: list[pa.Table] = []
    for frame in frames:
        if isinstance(frame, str):
            return Segment(first_row, batches, _lost(path, frame, batches))
        batches.append(known_columns(pa.ipc.open_stream(frame).read_all(), table))
    return Segment(first_row, batches, None)


def _first_row(path: Path, header: bytes | str, table: Table, run_id: str) -> int | str:
    """Return the row that a segment starts at, or what is wrong with its header."""
    if isinstance(header, str):
        return f"{header} before its first row"
    facts = json.loads(header)
    if facts["format"] > FORMAT:
        raise NewerFormatError(newer_format(path, facts["format"]))
    name = segment_path(path, table, facts["number"]).name
    if facts["run_id"] != run_id or facts["table"] != table.name or name != path.name:
        owner = f"segment {facts['number']} of {facts['table']}, run {facts['run_id']}"
        return f"{owner}, and is left out"
    return int(facts["first_row"])


def _frames(data: bytes) -> Iterator[bytes | str]:
    """Yield payloads; at the first that is not whole, what is wrong with it."""
    view, place, previous = memoryview(data), len(MAGIC), b""
    if data[:place] != MAGIC:
        yield "torn" if MAGIC.startswith(data[:place]) else "damaged"
        return
    if place == len(data):
        yield "torn"
    while place < len(data):
        start = place + _LENGTH.size + _CHECKSUM_BYTES
        if start > len(data):
            yield "torn"  # the file ends inside a frame: an interrupted write
            return
        (length,) = _LENGTH.unpack_from(data, place)
        payload = bytes(view[start : start + length])
        if len(payload) < length:
            yield "torn"
            return
        previous = _checksum(previous, payload)
        if previous != data[start - _CHECKSUM_BYTES : start]:
            yield "damaged"  # whole, but altered
            return
        yield payload
        place = start + length


def _checksum(previous: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(previous + payload).digest()


def _lost(path: Path, how: str, batches: list[pa.Table]) -> str:
    kept = sum(batch.num_rows for batch in batches)
    return f"{path.name} is {how} after {kept} rows, which are kept"


def known_columns(rows: pa.Table, table: Table) -> pa.Table:
    """Return the columns that the table has, in their types."""
    columns = {}
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        kind = table.types.get(name)
        if kind is not None:
            columns[name] = column if column.type == kind else column.cast(kind)
    return pa.table(columns)


def _read_stream(path: Path, data: bytes, table: Table) -> Segment:
    """Read a segment of format 1, which has no checksums."""
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(data))
        metadata = reader.schema.metadata or {}
        written = int(metadata.get(FORMAT_KEY, b"0"))
        first_row = int(metadata.get(FIRST_ROW_KEY, b"0"))
    except UNREADABLE:
        return Segment(None, [], f"{path.name} is torn before its first row")
    if written > FORMAT:
        raise NewerFormatError(newer_format(path, written))
    batches: list[pa.Table] = []
    try:
        for batch in reader:
            batch.validate(full=True)
            batches.append(known_columns(pa.Table.from_batches([batch]), table))
    except UNREADABLE:
        return Segment(first_row, batches, _lost(path, "torn", batches))
    return Segment(first_row, batches, None)
