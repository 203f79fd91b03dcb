"""Run directories: manifests, locks, sealing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from noisekit.core.errors import (
    NewerFormatError,
    RunDirectoryError,
    RunLockedError,
    StorageError,
)
from noisekit.records import (
    Manifest,
    RunDirectory,
    RunStatus,
    read_json,
    write_json_atomic,
)
from noisekit.records.integrity import signed

FACTORS = {"batch_size": 16, "learning_rate": 0.05}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    manifest = Manifest(run_id="a-seed0", arm="a", seed=0, factors=FACTORS)
    return RunDirectory.create(tmp_path / "a-seed0", manifest)


def write_steps(run: RunDirectory, first: int, last: int) -> None:
    with run.lock(), run.writer("steps", first_row=first) as writer:
        for step in range(first, last):
            writer.append({"step": step})


def test_a_manifest_comes_back_as_written(run: RunDirectory) -> None:
    """Catches: a field forgotten in reading, statuses that come back as text."""
    done = replace(
        run.manifest,
        status=RunStatus.DONE,
        reason="took 10 updates",
        costs={"train_seconds": 1.5},
        faults=("odd",),
        recipe={"model": {"hidden": [1, 2]}},
        data={"sha256": "ab"},
    )
    run.write_manifest(done)
    read = RunDirectory.open(run.path).manifest
    assert replace(read, updated="") == replace(done, updated="")
    assert read.status is RunStatus.DONE
    assert read.status.complete
    assert "torch" in read.versions
    assert read.host["cpus"]


def test_creating_over_a_run_is_refused(run: RunDirectory) -> None:
    """Catches: a second start that wipes the first run."""
    with pytest.raises(
        RunDirectoryError, match=r"needs an empty directory, but .*a-seed0"
    ):
        RunDirectory.create(run.path, run.manifest)


def test_a_manifest_of_a_newer_noisekit_is_refused(run: RunDirectory) -> None:
    """Catches: reading a format that this version does not know."""
    path = run.path / "manifest.json"
    content = {**json.loads(path.read_text()), "format": 3}
    del content["digest"]
    for newer in (content, signed(content)):
        path.write_text(json.dumps(newer))
        with pytest.raises(
            NewerFormatError, match=r"format 3, but .* up to format 2; upd"
        ):
            RunDirectory.open(run.path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "needs to hold JSON, got a damaged file"),
        ('{"run_id": "a"', "needs to hold JSON, got a damaged file"),
        ("[1, 2]", "needs to hold a JSON object, got a list"),
        ('{"run_id": "a", "format": 1}', "damaged one .*arm, seed, status"),
        (
            '{"run_id": "a", "arm": "b", "seed": "0", "status": "done", "format": 1}',
            "damaged one .*seed is '0'",
        ),
        (
            '{"run_id": "a", "arm": "b", "seed": 0, "status": "new", "format": 1}',
            "damaged one .*'new' is not a valid RunStatus",
        ),
    ],
)
def test_a_damaged_manifest_says_what_is_wrong(
    run: RunDirectory, content: str, says: str
) -> None:
    """Catches: a KeyError from deep inside, or defaults in place of what is lost."""
    (run.path / "manifest.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=says) as caught:
        RunDirectory.open(run.path)
    assert "delete the run's directory and resume to run it again" in str(caught.value)


def test_a_missing_manifest_says_so(tmp_path: Path) -> None:
    """Catches: a bare FileNotFoundError."""
    with pytest.raises(
        RunDirectoryError, match=r"manifest.json is missing; restore it"
    ):
        RunDirectory.open(tmp_path)


def test_json_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails leaves the old content and no temporary file.

    Catches: opening the file itself for writing.
    """
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": [1.5, float("inf"), float("nan")]})
    assert read_json(path, remedy="") == {"a": [1.5, "inf", "nan"]}

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=r"cannot write .*x.json: No space left"):
        write_json_atomic(path, {"a": 2})
    assert read_json(path, remedy="") == {"a": [1.5, "inf", "nan"]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_second_writer_is_told_who_the_first_is(run: RunDirectory) -> None:
    """Catches: a lock that only threads of one process respect."""
    script = f"""
from noisekit.core.errors import RunLockedError
from noisekit.records import RunDirectory
try:
    with RunDirectory.open({str(run.path)!r}).lock():
        print("entered")
except RunLockedError as error:
    print(error)
"""
    with run.lock():
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
    assert f"run a-seed0 needs to have one writer, but process {os.getpid()} on" in (
        done.stdout
    )
    with run.lock():
        pass


def test_a_killed_writer_leaves_no_lock(run: RunDirectory) -> None:
    """Catches: pid files, which outlive their process."""
    script = f"""
import time
from noisekit.records import RunDirectory
with RunDirectory.open({str(run.path)!r}).lock():
    print("locked", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(RunLockedError, match=f"process {holder.pid} on"),
            run.lock(),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run.lock():
            pass


def test_who_looks_for_a_moment_does_not_keep_a_writer_out(run: RunDirectory) -> None:
    """A lock that is free again within a fraction of a second is waited for.

    Catches: a run that fails since ``noisekit status`` asked whether it was locked.
    """
    script = f"""
import time
from noisekit.records import RunDirectory
with RunDirectory.open({str(run.path)!r}).lock():
    print("locked", flush=True)
    time.sleep(0.05)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with run.lock():
            entered = time.monotonic()
    assert entered > 0


def test_the_manifest_is_read_again_under_the_lock(run: RunDirectory) -> None:
    """Catches: a stale status that makes a finished run start anew."""
    other = RunDirectory.open(run.path)
    with run.lock():
        run.write_manifest(replace(run.manifest, status=RunStatus.DONE))
    assert other.manifest.status is RunStatus.CREATED
    with other.lock():
        assert other.manifest.status is RunStatus.DONE


def test_sealing_keeps_every_row_and_removes_the_segments(run: RunDirectory) -> None:
    """Catches: superseded rows that come back in Parquet."""
    write_steps(run, 0, 10)
    write_steps(run, 6, 12)
    with run.lock():
        assert list(run.seal()) == ["steps"]
    assert run.read("steps").rows["step"].to_pylist() == list(range(12))
    assert not list((run.path / "segments").iterdir())
    assert (run.path / "steps.parquet").exists()
    with run.lock():
        assert list(run.seal()) == []


@pytest.mark.parametrize("left", [1, 2])
def test_a_kill_between_parquet_and_removal_changes_nothing(
    run: RunDirectory, left: int
) -> None:
    """A segment that Parquet already holds is ignored, and removed by the next seal.

    Catches: reading both, so that an old segment takes the place of what superseded
    its rows.
    """
    write_steps(run, 0, 10)
    write_steps(run, 6, 12)
    segment = run.path / "segments" / f"steps-{left:04d}.segment"
    kept = segment.read_bytes()
    with run.lock():
        list(run.seal())
    segment.write_bytes(kept)
    assert run.read("steps").rows["step"].to_pylist() == list(range(12))
    with run.lock():
        assert list(run.seal()) == ["steps"]
    assert not segment.exists()
    assert run.read("steps").rows["step"].to_pylist() == list(range(12))


def test_a_sealed_table_can_be_gone_on_with(run: RunDirectory) -> None:
    """After a fall back to an older checkpoint, Parquet's later rows are superseded.

    Catches: numbering new segments from 1 again, so that Parquet hides them.
    """
    write_steps(run, 0, 10)
    with run.lock():
        list(run.seal())
    write_steps(run, 7, 9)
    assert run.read("steps").rows["step"].to_pylist() == list(range(9))
    with run.lock():
        list(run.seal())
    assert run.read("steps").rows["step"].to_pylist() == list(range(9))


def test_a_tear_at_the_end_is_on_record_when_sealed(run: RunDirectory) -> None:
    """Catches: sealing away the evidence of lost rows."""
    write_steps(run, 0, 5)
    segment = run.path / "segments" / "steps-0001.segment"
    segment.write_bytes(segment.read_bytes()[:-1])
    with run.lock():
        list(run.seal())
    faults = RunDirectory.open(run.path).manifest.faults
    assert faults == ("steps-0001.segment is torn after 0 rows, which are kept",)
