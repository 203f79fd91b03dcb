"""A run is a directory: manifest, tables, checkpoints, snapshots, one writer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

from noisekit.core.errors import RunDirectoryError, UsageError
from noisekit.records.files import (
    exclusive_lock,
    is_locked,
    plain,
    sync_directory,
    write_bytes_atomic,
    write_json_atomic,
)
from noisekit.records.integrity import digest_of, signed
from noisekit.records.manifest import Manifest
from noisekit.records.provenance import now
from noisekit.records.schema import FORMAT, TABLES, Table, table
from noisekit.records.segments import segments_of
from noisekit.records.stored_table import (
    RESTORE,
    StoredTable,
    encode_sealed,
    pending_path,
    read_table,
    sealed_fault,
    sealed_path,
)
from noisekit.records.tensors import Array, load_tensors, stated_checksum
from noisekit.records.writer import TableWriter

_NO_RUN = frozenset({"lock", "error.txt", ".manifest.json.tmp"})
"""Files that a directory may hold before it holds a run."""


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
            RunDirectoryError: If ``path`` holds a run already, or what is left of one.
        """
        path = Path(path)
        if (path / "manifest.json").exists():
            raise RunDirectoryError(
                f"a new run needs an empty directory, but {path} holds a run; "
                "resume that one, or choose another place."
            )
        if any(item.is_file() and item.name not in _NO_RUN for item in path.rglob("*")):
            raise RunDirectoryError(f"{path / 'manifest.json'} is missing; {RESTORE}.")
        run = cls(path, manifest)
        run.write_manifest(manifest)
        return run

    @classmethod
    def open(cls, path: Path | str, *, run_id: str | None = None) -> Self:
        """Return the run in ``path``.

        Args:
            path: The directory.
            run_id: The run that has to be there; any one if left out.

        Raises:
            RunDirectoryError: If there is no run, a damaged one, or another one.
        """
        path = Path(path)
        manifest = Manifest.read(path / "manifest.json")
        if run_id not in {None, manifest.run_id}:
            raise RunDirectoryError(
                f"{path / 'manifest.json'} needs to be that of run {run_id}, got that "
                f"of {manifest.run_id}; {RESTORE}."
            )
        return cls(path, manifest)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """Where snapshots of the weights lie."""
        return self.path / "snapshots"

    @property
    def optimizers(self) -> Path:
        """Where optimizer states lie that other runs go on with, by snapshot."""
        return self.path / "optimizers"

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
        """Replace the manifest, durably, with a digest of its own."""
        manifest = replace(manifest, updated=now(), format=FORMAT)
        content = plain(asdict(manifest))
        assert isinstance(content, dict)
        write_json_atomic(self.path / "manifest.json", signed(content))
        self.manifest = manifest

    def add_fault(self, text: str) -> None:
        """Put on record what a reader should know, once."""
        if text not in self.manifest.faults:
            faults = (*self.manifest.faults, text)
            self.write_manifest(replace(self.manifest, faults=faults))

    def read(self, name: str, *, columns: Sequence[str] | None = None) -> StoredTable:
        """Return what can be read of the table called ``name``.

        Args:
            name: One of ``TABLES``.
            columns: The columns that are needed; all by default.
        """
        stored = self._stored(table(name), columns)
        if stored.fault:
            # Sealed again since the manifest was read?
            with suppress(RunDirectoryError):
                fresh = Manifest.read(self.path / "manifest.json")
                if fresh != self.manifest:
                    self.manifest = fresh
                    stored = self._stored(table(name), columns)
        return stored

    def _stored(self, item: Table, columns: Sequence[str] | None = None) -> StoredTable:
        return read_table(
            self.path,
            item,
            run_id=self.manifest.run_id,
            digests=self.manifest.digests,
            columns=columns,
            last_segment=self.manifest.segments.get(item.name, 0),
        )

    def load_snapshot(self, name: str) -> dict[str, Array]:
        """Return the tensors of a snapshot, verified to be this run's.

        Raises:
            RunDirectoryError: If there is none of that name, or its file is missing,
                damaged, or not the one that this run wrote.
        """
        path = self.snapshots / f"{name}.safetensors"
        if path not in self.snapshots.glob("*"):
            known = (repr(file.stem) for file in sorted(self.snapshots.glob("*")))
            raise RunDirectoryError(
                f"run {self.manifest.run_id} needs the name of one of its snapshots "
                f"({', '.join(known) or 'there is none'}), got {name!r}; if the file "
                f"is lost, {RESTORE}."
            )
        arrays, facts = load_tensors(path, remedy=RESTORE, ours=True)
        wrong = self._tensors_fault(path) or self._other_owner(name, facts)
        if wrong:
            raise RunDirectoryError(
                f"{path} needs to be snapshot {name!r} of run {self.manifest.run_id}, "
                f"but {wrong}; {RESTORE}."
            )
        return arrays

    def _other_owner(self, name: str, facts: Mapping[str, str]) -> str | None:
        """Return whose a snapshot is, by its own facts, where it is not this run's."""
        taken = self.read("snapshots")
        names, places = (taken.column(c).to_pylist() for c in ("snapshot", "step"))
        steps = dict(zip(names, map(str, places), strict=True))
        run_id, step = facts.get("run_id"), facts.get("step")
        if run_id in {None, self.manifest.run_id} and step == steps.get(name, step):
            return None
        return f"it is of run {run_id}, update {step}"

    def _tensors_fault(self, path: Path) -> str | None:
        """Return what is wrong with a sealed file of tensors, by header and size."""
        known = (self.manifest.digests or {}).get(f"{path.parent.name}/{path.name}")
        if known is None:
            return None
        if not path.exists():
            return "it is missing"
        try:
            stated = stated_checksum(path)
        except RunDirectoryError:
            return "it is damaged"
        same = stated == known
        return None if same else "it does not match its digest in the manifest"

    def damage(self, *, weights: bool = False) -> list[str]:
        """Return what is wrong with the sealed files, in words.

        Tables are compared with their digests, and so are the checksums that the
        snapshots state; the weights themselves are verified when they are loaded.

        Args:
            weights: Also read the weights and compare them with these checksums.
        """
        digests = self.manifest.digests
        if digests is None:
            return [*self._damaged_weights()] if weights else []
        tables = (sealed_fault(self.path, item, digests) for item in TABLES.values())
        tensors = (self.path / name for name in digests if "/" in name)
        wrong = ((path, self._tensors_fault(path)) for path in tensors)
        return [
            *(fault for fault in tables if fault),
            *(f"{path.name}: {fault}; {RESTORE}" for path, fault in wrong if fault),
            *(self._damaged_weights() if weights else ()),
        ]

    def _damaged_weights(self) -> Iterator[str]:
        """Read each snapshot whose header is as sealed.

        Yields:
            What is wrong inside one.
        """
        for path in sorted(self.snapshots.glob("*.safetensors")):
            if self._tensors_fault(path) is None:
                try:
                    load_tensors(path, remedy=RESTORE, ours=True)
                except RunDirectoryError as error:
                    yield str(error)

    @property
    def verified(self) -> bool:
        """Whether damage to its files would be noticed; not in runs of format 1."""
        sealed = self.manifest.digests is not None
        return sealed or not self.manifest.status.complete

    @property
    def locked(self) -> bool:
        """Whether a process is writing to it; asking writes nothing."""
        return is_locked(self.path / "lock")

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
        if stored.sealed_lost:
            raise RunDirectoryError(f"{self.path}: {stored.fault}.")
        start = stored.num_rows if first_row is None else first_row
        if start > stored.num_rows:
            raise RunDirectoryError(
                f"table {name!r} of {self.path} needs {start} rows to go on from, got "
                f"{stored.num_rows} ({stored.fault or 'the others were lost'}); "
                f"{RESTORE}."
            )
        return TableWriter(
            self.path,
            table(name),
            run_id=self.manifest.run_id,
            number=stored.last_segment + 1,
            first_row=start,
        )

    def seal(self) -> Iterator[str]:
        """Turn the segments of each table into Parquet; digests go into the manifest.

        May be cut short and begun again at any point; where the disk is full the
        segments stay.

        Yields:
            The name of each table once it is sealed.

        Raises:
            RunDirectoryError: If a table that was sealed before is lost.
        """
        open_tables = [item for item in TABLES.values() if segments_of(self.path, item)]
        known = self.manifest.digests
        # New files first, under other names, then their digests, then their names: a
        # reader finds the digest's file under one of the two at every moment.
        digests = {
            **(self._adopted() if known is None else known),
            **{sealed_path(self.path, t).name: self._prepare(t) for t in open_tables},
            **self._tensor_digests(),
        }
        if digests != self.manifest.digests:
            self.write_manifest(replace(self.manifest, digests=digests))
        for item in open_tables:
            self._name_sealed(item)
            yield item.name

    def _name_sealed(self, item: Table) -> None:
        """Give a table's new Parquet file its name, and remove what it holds."""
        with suppress(FileNotFoundError):  # has its name since an earlier attempt
            pending_path(self.path, item).replace(sealed_path(self.path, item))
        sync_directory(self.path)
        for path in segments_of(self.path, item).values():
            path.unlink()

    def _adopted(self) -> dict[str, str]:
        """Return digests of what format 1 sealed, as it is now."""
        result = {}
        for path in (sealed_path(self.path, item) for item in TABLES.values()):
            if path.exists():
                result[path.name] = digest_of(path.read_bytes())
                self.add_fault(f"{path.name} was sealed before files had digests")
        return result

    def _tensor_digests(self) -> dict[str, str]:
        result = {}
        folders = (self.snapshots, self.optimizers)
        paths = (
            path for each in folders for path in sorted(each.glob("*.safetensors"))
        )
        for path in paths:
            try:
                result[f"{path.parent.name}/{path.name}"] = stated_checksum(path)
            except RunDirectoryError as error:
                self.add_fault(str(error))
        return result

    def _prepare(self, item: Table) -> str:
        """Write a table's Parquet file beside the old one and return its digest."""
        stored = self._stored(item)
        if stored.sealed_lost:
            raise RunDirectoryError(f"{self.path}: {stored.fault}.")
        if stored.fault:
            self.add_fault(stored.fault)
        known = (self.manifest.digests or {}).get(sealed_path(self.path, item).name)
        if known and stored.sealed_through == stored.last_segment:
            return known
        data = encode_sealed(stored)
        write_bytes_atomic(pending_path(self.path, item), data)
        return digest_of(data)
