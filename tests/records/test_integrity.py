"""Files that were altered, swapped, cut or removed: named, and never read as good."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from noisekit.core.errors import RunDirectoryError, StorageError
from noisekit.records import (
    Manifest,
    RunDirectory,
    Runs,
    RunStatus,
    open_runs,
    read_set,
    save_tensors,
    write_set,
)

Damage = Callable[[Path], None]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = (flip, cut, Path.unlink)


def make_run(folder: Path, run_id: str, *, loss: float, sealed: bool) -> RunDirectory:
    """A run of two arms' kind, with evaluations, a snapshot and costs."""
    manifest = Manifest(run_id=run_id, arm=run_id, seed=0, factors={"batch_size": 8})
    run = RunDirectory.create(folder / "runs" / run_id, manifest)
    with run.lock():
        for first in (0, 3):
            with run.writer("evaluations") as writer:
                for step in range(first, first + 3):
                    writer.append({"step": step, "train_loss": loss})
        with run.writer("snapshots") as writer:
            writer.append({"snapshot": "final", "step": 5, "train_loss": loss})
        weights = {"w": np.full(64, loss)}
        facts = {"run_id": run_id, "step": "5"}
        save_tensors(run.snapshots / "final.safetensors", weights, facts)
        if sealed:
            list(run.seal())
            run.write_manifest(replace(run.manifest, status=RunStatus.DONE))
    return run


@pytest.fixture(params=[True, False], ids=["sealed", "open"])
def set_dir(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_set(tmp_path, {"recipe": {"name": "toy"}, "runs": ["a", "b"]})
    make_run(tmp_path, "a", loss=1.0, sealed=request.param)
    make_run(tmp_path, "b", loss=2.0, sealed=request.param)
    return tmp_path


def losses(runs: Runs, run_id: str) -> set[float]:
    frame = runs.evaluations
    return set(frame.loc[frame["run_id"] == run_id, "train_loss"])


def files_of(run: Path) -> list[Path]:
    return sorted(p for p in run.rglob("*") if p.is_file() and p.name != "lock")


def test_an_unharmed_set_has_no_faults(set_dir: Path) -> None:
    """Catches: digests of something else than what is on the disk."""
    runs = open_runs(set_dir)
    assert len(runs.evaluations) == 12
    assert runs.faults == []
    assert runs.weights("b", "final")["w"][0] == 2.0


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_of_a_file_is_a_fault_of_its_run(set_dir: Path, damage: Damage) -> None:
    """Its values are right or absent, and it is named; the other run is whole.

    Catches: Parquet, segments or weights read without a look at their digest; one
    damaged file that makes all runs unreadable.
    """
    for path in files_of(set_dir / "runs" / "a"):
        backup = path.read_bytes()
        damage(path)
        runs = open_runs(set_dir)
        assert set(runs.snapshots["train_loss"]) <= {1.0, 2.0}, path.name
        assert losses(runs, "b") == {2.0}, path.name
        assert losses(runs, "a") <= {1.0}, path.name
        refused = ""
        try:
            assert (runs.weights("a", "final")["w"] == 1.0).all(), path.name
        except RunDirectoryError as error:
            refused = str(error)
        told = [fault for fault in [*runs.faults, refused] if path.stem in fault]
        sealed = (set_dir / "runs/a/evaluations.parquet").exists()
        # A segment that is gone as a whole, or from its end, is as if never written.
        written_later = not sealed and path.name.startswith(("snapshots-", "evalua"))
        assert told or (damage is not flip and written_later), path.name
        path.write_bytes(backup)


@pytest.mark.parametrize("kind", ["*.parquet", "segments/*", "snapshots/*"])
def test_files_of_another_run_are_noticed(set_dir: Path, kind: str) -> None:
    """Catches: digests that do not say whose file it is; names that nobody compares."""
    for path in sorted((set_dir / "runs/a").glob(kind)):
        backup = path.read_bytes()
        shutil.copyfile(set_dir / "runs/b" / path.relative_to(set_dir / "runs/a"), path)
        runs = open_runs(set_dir)
        assert losses(runs, "a") <= {1.0}
        assert set(runs.snapshots["train_loss"]) <= {1.0, 2.0}
        if kind == "snapshots/*":
            with pytest.raises(RunDirectoryError, match="snapshot 'final' of run a"):
                runs.weights("a", "final")
        else:
            assert any(path.name in fault for fault in runs.faults)
        path.write_bytes(backup)


def test_segments_that_change_places_are_noticed(tmp_path: Path) -> None:
    """Catches: a header that names the run but not which part of it."""
    run = make_run(tmp_path, "a", loss=1.0, sealed=False)
    one, two = sorted(run.path.glob("segments/evaluations-*"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    stored = run.read("evaluations")
    assert stored.num_rows == 0
    assert stored.fault is not None
    assert "is segment 2 of evaluations, run a" in stored.fault


def test_a_batch_that_is_taken_out_is_noticed(tmp_path: Path) -> None:
    """Catches: a checksum per batch that says nothing of the batches before it."""
    run = make_run(tmp_path, "c", loss=1.0, sealed=False)
    with run.lock(), run.writer("steps") as writer:
        ends = []
        for step in range(3):
            writer.append({"step": step})
            writer.flush()
            ends.append((run.path / "segments/steps-0001.segment").stat().st_size)
    path = run.path / "segments/steps-0001.segment"
    data = path.read_bytes()
    path.write_bytes(data[: ends[0]] + data[ends[1] :])
    stored = run.read("steps")
    assert stored.column("step").to_pylist() == [0]
    assert stored.fault == "steps-0001.segment is damaged after 1 rows, which are kept"


def test_swapped_manifests_and_backups_are_left_out(set_dir: Path) -> None:
    """A directory of a set holds the run that it is named after, and no copy of one.

    Catches: a backup inside ``runs`` that doubles a run.
    """
    shutil.copytree(set_dir / "runs/a", set_dir / "runs/a-backup")
    runs = open_runs(set_dir)
    assert list(runs.runs["run_id"]) == ["a", "b"]
    assert len(runs.evaluations) == 12
    assert any("a-backup is left out" in fault for fault in runs.faults)


def test_a_run_whose_directory_is_gone_is_named(set_dir: Path) -> None:
    """Catches: a set that shrinks without a word."""
    shutil.rmtree(set_dir / "runs/b")
    runs = open_runs(set_dir)
    assert runs.faults == ["b is missing: its directory is not there"]


def test_an_altered_set_leaves_its_runs_readable(set_dir: Path) -> None:
    """The recipe is not believed, and the runs are there.

    Catches: margins of verdicts read from an altered file; a set that one bad bit in
    a small file makes unreadable.
    """
    path = set_dir / "set.json"
    path.write_text(path.read_text().replace("toy", "tax"))
    runs = open_runs(set_dir)
    assert runs.recipe == {}
    assert len(runs) == 2
    assert len(runs.faults) == 1
    assert "the recipe of the set is not known" in runs.faults[0]
    with pytest.raises(RunDirectoryError, match=r"was altered since .* keeps its runs"):
        read_set(set_dir)


def test_runs_without_digests_are_said_to_be_unverified(tmp_path: Path) -> None:
    """A run of format 1 is read, and one sentence says what is not known.

    Catches: older records refused; silence about what cannot be checked.
    """
    run = make_run(tmp_path, "a", loss=1.0, sealed=True)
    path = run.path / "manifest.json"
    content = json.loads(path.read_text()) | {"format": 1}
    del content["digest"], content["digests"]
    path.write_text(json.dumps(content))
    runs = open_runs(run.path)
    assert len(runs.evaluations) == 6
    assert len(runs.faults) == 1
    assert runs.faults[0].startswith("1 runs are unverified (a)")


def test_a_manifest_of_today_needs_its_digest(tmp_path: Path) -> None:
    """Catches: a digest that one can leave out."""
    run = make_run(tmp_path, "a", loss=1.0, sealed=True)
    path = run.path / "manifest.json"
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_text(json.dumps(content))
    with pytest.raises(RunDirectoryError, match="was altered since"):
        RunDirectory.open(run.path)


def test_a_lost_table_is_neither_sealed_over_nor_written_to(tmp_path: Path) -> None:
    """Catches: new rows that start at 0 in the place of lost ones."""
    run = make_run(tmp_path, "a", loss=1.0, sealed=True)
    flip(run.path / "evaluations.parquet")
    with run.lock(), pytest.raises(RunDirectoryError, match="restore it from a copy"):
        run.writer("evaluations")


@pytest.mark.parametrize("name", ["../../b/snapshots/final", "x", "", "a/../final"])
def test_only_a_snapshot_of_the_run_is_loaded(set_dir: Path, name: str) -> None:
    """Catches: names that lead into another run's directory."""
    with pytest.raises(RunDirectoryError, match=r"one of its snapshots \('final'\)"):
        open_runs(set_dir).weights("a", name)


def test_a_run_is_not_begun_among_what_is_left_of_one(tmp_path: Path) -> None:
    """Catches: old tables adopted by a new run whose manifest was lost."""
    run = make_run(tmp_path, "a", loss=1.0, sealed=True)
    (run.path / "manifest.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"manifest\.json is missing; restore"):
        RunDirectory.create(run.path, run.manifest)


@pytest.mark.parametrize("moment", ["before the digests", "before the names"])
def test_a_kill_while_sealing_loses_nothing(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sealed anew after more rows, a reader finds one whole table at every moment.

    Catches: a digest that is replaced before its file is, or after.
    """
    run = make_run(tmp_path, "a", loss=1.0, sealed=True)
    with run.lock(), run.writer("evaluations") as writer:
        writer.append({"step": 6, "train_loss": 1.0})

    def die(*_: object) -> None:
        raise StorageError("killed")

    name = "write_manifest" if moment == "before the digests" else "_name_sealed"
    with run.lock(), monkeypatch.context() as patch:
        patch.setattr(RunDirectory, name, die)
        with pytest.raises(StorageError, match="killed"):
            list(run.seal())
    again = RunDirectory.open(run.path)
    for _ in range(2):
        stored = again.read("evaluations")
        assert stored.fault is None
        assert stored.column("step").to_pylist() == list(range(7))
        assert again.damage() == []
        with again.lock():
            list(again.seal())
    assert not list(run.path.glob(".*"))
    assert not list(run.path.glob("segments/*"))


def test_asking_who_writes_writes_nothing(tmp_path: Path) -> None:
    """Catches: a lock file made by who only looks."""
    run = make_run(tmp_path, "a", loss=1.0, sealed=False)
    (run.path / "lock").unlink()
    assert not run.locked
    assert not (run.path / "lock").exists()
    with run.lock():
        assert RunDirectory.open(run.path).locked


def test_weights_are_verified_where_that_is_wanted(set_dir: Path) -> None:
    """A bit of the weights themselves, which no header shows.

    Catches: an option that looks at headers only.
    """
    path = set_dir / "runs" / "a" / "snapshots" / "final.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4  # the header is in front
    path.write_bytes(bytes(data))
    assert open_runs(set_dir).faults == []
    faults = open_runs(set_dir, verify_weights=True).faults
    assert len(faults) == 1
    assert "final.safetensors" in faults[0]
