"""What the disk has when a checkpoint gets its name, as after a power failure."""

import os
from pathlib import Path

import pytest

from noisekit.train.runs.loop import train_run
from tests.train.run_specs import new_run, run_spec


class _Disk:
    """Notes how much of each file was waited for, and in what order files appear."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[int, int] = {}
        self.renamed: list[tuple[str, bool]] = []
        self.lost: list[str] = []
        self._fsync, self._replace = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", self._on_fsync)
        monkeypatch.setattr(Path, "replace", lambda *paths: self._on_replace(*paths))

    def _on_fsync(self, file: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        found = os.fstat(descriptor)
        self.sizes[found.st_ino] = found.st_size
        self._fsync(file)

    def _is_durable(self, path: Path) -> bool:
        found = path.stat()
        return self.sizes.get(found.st_ino) == found.st_size

    def _on_replace(self, temporary: Path, target: Path) -> Path:
        if target.name.startswith("update-"):
            self.renamed.append((target.name, self._is_durable(temporary)))
            tables = target.parents[1].glob("segments/**/*")
            rows = [path for path in tables if path.is_file()]
            assert rows
            self.lost += [str(path) for path in rows if not self._is_durable(path)]
        return self._replace(temporary, target)


def test_rows_are_on_the_disk_before_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the checkpoint is before it gets its name.

    Catches: a flush that leaves rows to the system's own time; a checkpoint that is
    renamed into place before its bytes are written, and is empty after a power failure.
    """
    disk = _Disk(monkeypatch)
    spec = run_spec(compute={"checkpoint_updates": 10}, probe={"every": 3})
    train_run(spec, new_run(spec, tmp_path))
    assert len(disk.renamed) >= 4
    assert all(durable for _, durable in disk.renamed)
    assert disk.lost == []
