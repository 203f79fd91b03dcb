"""A run is a directory: manifest, tables, checkpoints, snapshots, one writer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from noisekit.core.errors import (
    NewerFormatError,
    RunDirectoryError,
    UsageError,
)
from noisekit.records.files import (
    exclusive_lock,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
)
from noisekit.records.provenance import host_facts, now, software_versions
from noisekit.records.schema import (
    FORMAT,
    FORMAT_KEY,
    LAST_SEGMENT_KEY,
    TABLES,
    Table,
    table,
)
from noisekit.records.segments import (
    StoredTable,
    newer_format,
    read_table,
    sealed_path,
    segment_numbers,
    segment_path,
)
from noisekit.records.writer import TableWriter

_REMEDY = "restore it, or delete the run's directory and resume to run it again"


class RunStatus(StrEnum):
    """How far a run is."""

    CREATED = "created"
    RUNNING = "running"
    DONE = "done"
    DIVERGED = "diverged"
    """The loss left the finite numbers, which is a result, recorded and complete."""
    FAILED = "failed"
    """An error stopped it; it can be resumed."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self in {RunStatus.DONE, RunStatus.DIVERGED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a run is, what it was made with, and how far it is.

    Attributes:
        run_id: Name, unique in its set.
        arm: Arm of the experiment.
        seed: Seed of all its random streams.
        factors: What the arms differ in.
        recipe: Everything that decides its bits, resolved.
        data: Name, origin and digest of its data.
        status: How far it is.
        reason: Why it ended as it did.
        versions: Versions of the software that began it.
        host: The machine that began it.
        created: When it was created, ISO 8601.
        updated: When this manifest was written, ISO 8601.
        costs: What it took, such as ``train_seconds``.
        faults: What a reader should know before trusting its bits.
        format: Version of the directory.
    """

    run_id: str
    arm: str
    seed: int
    factors: Mapping[str, object] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    status: RunStatus = RunStatus.CREATED
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=software_versions)
    host: Mapping[str, str] = field(default_factory=host_facts)
    created: str = field(default_factory=now)
    updated: str = field(default_factory=now)
    costs: Mapping[str, float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the manifest in ``path``.

        Raises:
            RunDirectoryError: If it is missing or damaged.
            NewerFormatError: If a newer noisekit wrote it.
        """
        content = read_json(path, remedy=_REMEDY)
        written = content.get("format")
        if isinstance(written, int) and written > FORMAT:
            raise NewerFormatError(newer_format(path, written))
        try:
            return cls._from(content)
        except (KeyError, TypeError, ValueError) as error:
            raise RunDirectoryError(
                f"{path} needs to hold a run's manifest, got a damaged one "
                f"({type(error).__name__}: {error}); {_REMEDY}."
            ) from error

    @classmethod
    def _from(cls, content: dict[str, object]) -> Self:
        missing = {"run_id", "arm", "seed", "status", "format"} - content.keys()
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        for name, kind in _KINDS.items():
            if name in content and not isinstance(content[name], kind):
                raise TypeError(f"{name} is {content[name]!r}")
        known = {item.name for item in fields(cls)}
        values = {key: value for key, value in content.items() if key in known}
        values["status"] = RunStatus(str(content["status"]))
        faults = content.get("faults")
        values["faults"] = tuple(faults) if isinstance(faults, list) else ()
        # The kinds were checked above, one by one.
        return cls(**values)  # type: ignore[arg-type]


_KINDS: Mapping[str, type] = {
    "run_id": str,
    "arm": str,
    "seed": int,
    "factors": dict,
    "recipe": dict,
    "data": dict,
    "versions": dict,
    "host": dict,
    "costs": dict,
    "faults": list,
    "format": int,
}


class RunDirectory:
    """One run's directory.

    Reading needs nothing; writing needs ``lock``. Whatever writes raises
    ``StorageError`` where the file system refuses, and leaves what was there.

    Attributes:
        path: The directory.
        manifest: The manifest as last read or written here.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._locked = False

    @classmethod
    def create(cls, path: Path | str, manifest: Manifest) -> Self:
        """Make the directory of a new run.

        Raises:
            RunDirectoryError: If ``path`` holds a run already.
        """
        path = Path(path)
        if (path / "manifest.json").exists():
            raise RunDirectoryError(
                f"a new run needs an empty directory, but {path} holds a run; "
                "resume that one, or choose another place."
            )
        run = cls(path, manifest)
        run.write_manifest(manifest)
        return run

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Return the run in ``path``."""
        path = Path(path)
        return cls(path, Manifest.read(path / "manifest.json"))

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """Where snapshots of the weights lie."""
        return self.path / "snapshots"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one writer, and read the manifest as the last writer left it.

        Where another process is writing, ``RunLockedError`` names it.
        """
        with exclusive_lock(self.path / "lock", what=f"run {self.manifest.run_id}"):
            self.manifest = Manifest.read(self.path / "manifest.json")
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest, durably."""
        manifest = replace(manifest, updated=now())
        write_json_atomic(self.path / "manifest.json", asdict(manifest))
        self.manifest = manifest

    def add_fault(self, text: str) -> None:
        """Put on record what a reader should know, once."""
        if text not in self.manifest.faults:
            faults = (*self.manifest.faults, text)
            self.write_manifest(replace(self.manifest, faults=faults))

    def read(self, name: str) -> StoredTable:
        """Return what can be read of the table called ``name``."""
        return read_table(self.path, table(name))

    def writer(self, name: str, *, first_row: int | None = None) -> TableWriter:
        """Return a writer that goes on with the table called ``name``.

        Args:
            name: One of ``TABLES``.
            first_row: Row to go on from; later rows are superseded. The end of the
                table if left out.

        Raises:
            RunDirectoryError: If the run is not locked, or has fewer rows than that.
        """
        if not self._locked:
            raise UsageError(
                f"writing to {self.path} needs its lock; use 'with run.lock():'."
            )
        stored = self.read(name)
        start = stored.rows.num_rows if first_row is None else first_row
        if start > stored.rows.num_rows:
            raise RunDirectoryError(
                f"table {name!r} of {self.path} needs {start} rows to go on from, got "
                f"{stored.rows.num_rows}; resume from an earlier checkpoint."
            )
        return TableWriter(
            self.path, table(name), number=stored.last_segment + 1, first_row=start
        )

    def seal(self) -> Iterator[str]:
        """Turn the segments of each table into Parquet.

        May be cut short and begun again at any point; where the disk is full the
        segments stay.

        Yields:
            The name of each table once it is sealed.
        """
        for item in TABLES.values():
            if segment_numbers(self.path, item):
                self._seal(item)
                yield item.name

    def _seal(self, item: Table) -> None:
        stored = read_table(self.path, item)
        if stored.fault:
            self.add_fault(stored.fault)
        metadata = {FORMAT_KEY: str(FORMAT), LAST_SEGMENT_KEY: str(stored.last_segment)}
        sink = pa.BufferOutputStream()
        rows = stored.rows.replace_schema_metadata(metadata)
        pq.write_table(rows, sink, compression="zstd")
        write_bytes_atomic(sealed_path(self.path, item), sink.getvalue().to_pybytes())
        for number in segment_numbers(self.path, item):
            segment_path(self.path, item, number).unlink()
