"""A run directory for somebody's own training loop: where a probe's readings go."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from noisekit.records.manifest import Manifest, RunStatus
from noisekit.records.rundir import RunDirectory
from noisekit.records.writer import Cell


class HasRow(Protocol):
    """A reading, as far as a table is concerned."""

    def row(self) -> Mapping[str, Cell]:
        """Return the reading as one row of the steps table."""


class RunSink:
    """Writes the readings of a probe as a run of its own, readable at any time.

    Pass it in the ``sinks`` of ``attach`` and close it, or use it in a ``with``
    block; ``open_runs`` and the report take the directory. Such a run belongs to no
    experiment and claims nothing. A loop that was killed goes on in the same
    directory, after the rows that are there.
    """

    def __init__(
        self, path: Path | str, *, run_id: str | None = None, seed: int = 0
    ) -> None:
        """Make the directory, or open the run that it holds, and lock it.

        Args:
            path: Directory of the run.
            run_id: Name of the run; the directory's if left out.
            seed: Seed of the loop, to distinguish several runs of it.
        """
        path = Path(path)
        if (path / "manifest.json").exists():
            self._run = RunDirectory.open(path)
        else:
            name = run_id or path.name
            manifest = Manifest(run_id=name, arm=name, seed=seed)
            self._run = RunDirectory.create(path, manifest)
        with ExitStack() as stack:
            stack.enter_context(self._run.lock())
            self._writer = self._run.writer("steps")
            stack.callback(self._writer.close)
            self._set_status(RunStatus.RUNNING)
            self._stack = stack.pop_all()

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self._run.path

    def __call__(self, reading: HasRow) -> None:
        """Write one reading."""
        self._writer.append(reading.row())

    def close(self) -> None:
        """Make all rows durable, seal the run and free its lock."""
        with self._stack:
            self._writer.flush(durable=True)
            for _ in self._run.seal():
                pass
            self._set_status(RunStatus.DONE)

    def __enter__(self) -> Self:
        """Return the sink itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; after an error the rows are kept and the run stays unsealed."""
        if error is None:
            self.close()
            return
        with self._stack:
            self._writer.flush(durable=True)
            self._set_status(RunStatus.FAILED, f"{type(error).__name__}: {error}")

    def _set_status(self, status: RunStatus, reason: str = "") -> None:
        begun = {**self._run.manifest.segments, "steps": self._writer.number}
        changed = replace(
            self._run.manifest, status=status, reason=reason, segments=begun
        )
        self._run.write_manifest(changed)
