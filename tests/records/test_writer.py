"""Rows on disk: whole batches, superseded rows, full disks, torn files."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from noisekit.core.errors import (
    NewerFormatError,
    RunDirectoryError,
    StorageError,
    UsageError,
)
from noisekit.records import Manifest, RunDirectory, TableWriter, table
from noisekit.records.schema import FIRST_ROW_KEY, FORMAT_KEY


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    manifest = Manifest(run_id="a-seed0", arm="a", seed=0)
    return RunDirectory.create(tmp_path / "a-seed0", manifest)


def append_steps(writer: TableWriter, steps: range, loss: float = 0.0) -> None:
    for step in steps:
        writer.append({"step": step, "batch_loss": loss})


def steps_of(run: RunDirectory) -> list[int]:
    rows: list[int] = run.read("steps").rows["step"].to_pylist()
    return rows


def segment(run: RunDirectory, number: int = 1) -> Path:
    return run.path / "segments" / f"steps-{number:04d}.segment"


def test_rows_are_readable_while_the_writer_is_open(run: RunDirectory) -> None:
    """Flushed rows are there for another reader, in order; missing cells are empty.

    Catches: a writer that only a close makes readable.
    """
    with run.lock():
        writer = run.writer("steps")
        append_steps(writer, range(5), loss=0.5)
        assert writer.flush(durable=True) == 5
        rows = RunDirectory.open(run.path).read("steps").rows.to_pylist()
        writer.close()
    assert [row["step"] for row in rows] == list(range(5))
    assert rows[0]["batch_loss"] == 0.5
    assert rows[0]["learning_rate"] is None


def test_a_resumed_writer_supersedes_rows_past_its_first(run: RunDirectory) -> None:
    """Rows after the watermark are replaced, those before it stay.

    Catches: duplicated rows after a resume; superseding by position in the segment
    instead of position in the table.
    """
    with run.lock():
        for first, steps, loss in ((0, range(10), 1.0), (6, range(6, 9), 2.0)):
            with run.writer("steps", first_row=first) as writer:
                append_steps(writer, steps, loss)
        with run.writer("steps", first_row=8) as writer:
            append_steps(writer, range(8, 12), 3.0)
    rows = run.read("steps").rows
    assert rows["step"].to_pylist() == list(range(12))
    assert rows["batch_loss"].to_pylist() == [1.0] * 6 + [2.0] * 2 + [3.0] * 4


def test_a_resumed_writer_supersedes_before_it_writes(run: RunDirectory) -> None:
    """The segment alone drops the rows behind its first row.

    Catches: rows of the killed process that reappear since none replaced them.
    """
    with run.lock():
        with run.writer("steps") as writer:
            append_steps(writer, range(10))
        run.writer("steps", first_row=4).close()
    assert steps_of(run) == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", [1, 100, 400])
def test_a_torn_batch_leaves_the_rows_before_it(run: RunDirectory, lost: int) -> None:
    """Cut anywhere in the last batch, earlier batches are read and the tear is named.

    Catches: a reader that raises, or one that gives up the whole segment.
    """
    with run.lock(), run.writer("steps") as writer:
        append_steps(writer, range(3))
        writer.flush()
        append_steps(writer, range(3, 7))
    path = segment(run)
    path.write_bytes(path.read_bytes()[:-lost])
    stored = run.read("steps")
    assert stored.rows["step"].to_pylist() == [0, 1, 2]
    assert stored.fault == "steps-0001.segment is torn after 3 rows, which are kept"


def test_a_torn_batch_that_was_written_again_is_no_fault(run: RunDirectory) -> None:
    """Once a later segment goes on without a gap, nothing is missing.

    Catches: a fault reported for ever after each kill.
    """
    with run.lock(), run.writer("steps") as writer:
        append_steps(writer, range(3))
        writer.flush()
        append_steps(writer, range(3, 7))
    path = segment(run)
    path.write_bytes(path.read_bytes()[:-1])
    with run.lock(), run.writer("steps") as writer:
        append_steps(writer, range(3, 7))
    stored = run.read("steps")
    assert stored.rows["step"].to_pylist() == list(range(7))
    assert stored.fault is None


def test_every_prefix_of_a_segment_reads_as_a_prefix_of_its_rows(
    run: RunDirectory,
) -> None:
    """Whatever byte a kill falls on, a reader sees the first rows and no others.

    Catches: half a batch, rows of zeros, an exception from the reader.
    """
    with run.lock(), run.writer("steps") as writer:
        for start in range(0, 6, 2):
            append_steps(writer, range(start, start + 2))
            writer.flush()
    path = segment(run)
    whole = path.read_bytes()
    seen = set()
    for size in range(0, len(whole) + 1, 97):
        path.write_bytes(whole[:size])
        steps = steps_of(run)
        assert steps == list(range(len(steps)))
        seen.add(len(steps))
    assert seen >= {0, 2, 4}


def test_rows_appended_together_are_one_batch(run: RunDirectory) -> None:
    """They are seen all or none, however many they are.

    Catches: the flush after 256 rows, which would split them.
    """
    with run.lock(), run.writer("steps") as writer:
        writer.append_together({"step": i} for i in range(1000))
        writer.append_together([{"step": 1000}])
    path = segment(run)
    path.write_bytes(path.read_bytes()[:-1])
    assert len(steps_of(run)) == 1000


def test_a_full_disk_loses_no_row(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segment is cut back to whole batches, and the next flush tries again.

    Catches: half a batch left in the file, before later batches; rows dropped with
    the failed write.
    """
    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > 100:
            return write(descriptor, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with run.lock(), run.writer("steps") as writer:
        append_steps(writer, range(3))
        writer.flush()
        before = segment(run).read_bytes()
        append_steps(writer, range(3, 6))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(
                StorageError,
                match=r"cannot write .*steps-0001.segment: No space left on device\. "
                r"What was durable before is still there; free some space",
            ):
                writer.flush()
        assert segment(run).read_bytes() == before
        assert writer.flush() == 6
    assert steps_of(run) == list(range(6))


def test_a_file_size_limit_loses_nothing_durable(tmp_path: Path) -> None:
    """With a real limit of the kernel the process gets an error, and rows stay.

    Catches: relying on exceptions that only a patched ``write`` raises.
    """
    script = f"""
import resource
from noisekit.records import Manifest, RunDirectory
from noisekit.core.errors import StorageError
manifest = Manifest(run_id="r", arm="a", seed=0)
run = RunDirectory.create({str(tmp_path / "r")!r}, manifest)
with run.lock():
    writer = run.writer("steps")
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    for step in range(100_000):
        try:
            writer.append({{"step": step}})
        except StorageError as error:
            print(writer.num_rows - 256, error)
            break
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    count = int(done.stdout.split()[0])
    assert "File too large" in done.stdout
    run = RunDirectory.open(tmp_path / "r")
    assert steps_of(run) == list(range(count))
    assert run.read("steps").fault is None
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 40_000


def test_an_unknown_column_is_refused(run: RunDirectory) -> None:
    """Catches: values that vanish since Arrow drops unknown keys."""
    with (
        run.lock(),
        run.writer("steps") as writer,
        pytest.raises(UsageError, match=r"'steps' needs columns .*, got loss_of_batch"),
    ):
        writer.append({"loss_of_batch": 1.0})


def test_a_value_of_the_wrong_type_is_refused(run: RunDirectory) -> None:
    """Catches: a batch that cannot be written taking others with it silently."""
    with run.lock():
        writer = run.writer("steps")
        writer.append({"step": "three"})
        with pytest.raises(UsageError, match="'steps' needs values of its columns"):
            writer.flush()
        writer.close()


def test_writing_needs_the_lock(run: RunDirectory) -> None:
    """Catches: two writers that each believe to be alone."""
    with pytest.raises(UsageError, match=r"needs its lock; use 'with run.lock\(\):'"):
        run.writer("steps")


def test_rows_that_are_not_there_cannot_be_gone_on_from(run: RunDirectory) -> None:
    """Catches: a gap in the table after rows were lost."""
    with (
        run.lock(),
        pytest.raises(RunDirectoryError, match="needs 5 rows to go on from, got 0"),
    ):
        run.writer("steps", first_row=5)


def test_a_segment_after_a_gap_is_left_out_and_named(run: RunDirectory) -> None:
    """Catches: rows moved up into the place of lost ones."""
    with run.lock():
        for steps in (range(4), range(4, 8)):
            with run.writer("steps") as writer:
                append_steps(writer, steps)
    segment(run, 1).unlink()
    stored = run.read("steps")
    assert stored.rows.num_rows == 0
    assert stored.fault is not None
    assert "steps-0002.segment starts at row 4, but only 0 rows" in stored.fault


def test_a_segment_of_a_newer_format_is_refused(run: RunDirectory) -> None:
    """Catches: reading columns whose meaning has changed."""
    metadata = {FORMAT_KEY: b"99", FIRST_ROW_KEY: b"0"}
    schema = table("steps").schema.with_metadata(metadata)
    path = segment(run).with_suffix(".arrow")
    path.parent.mkdir()
    path.write_bytes(schema.serialize().to_pybytes())
    with pytest.raises(NewerFormatError, match=r"has format 99, .* update noisekit"):
        run.read("steps")


def test_an_older_segment_with_fewer_columns_is_read(run: RunDirectory) -> None:
    """Catches: schemas compared as a whole, so that a new column breaks old runs."""
    schema = pa.schema([("step", pa.int32()), ("gone", pa.string())])
    batch = pa.RecordBatch.from_pylist([{"step": 3, "gone": "x"}], schema=schema)
    path = segment(run).with_suffix(".arrow")
    path.parent.mkdir()
    path.write_bytes(schema.serialize().to_pybytes() + batch.serialize().to_pybytes())
    rows = run.read("steps").rows.to_pylist()
    assert rows[0]["step"] == 3
    assert rows[0]["batch_loss"] is None
    assert "gone" not in rows[0]
