"""Readings of somebody's own loop, as a run that can be opened."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from noisekit.core.errors import RunLockedError
from noisekit.records import RunDirectory, RunSink, RunStatus, open_runs


@dataclass
class Reading:
    step: int

    def row(self) -> dict[str, float]:
        return {"step": self.step, "grad_sq_norm": self.step / 2}


def test_readings_become_a_run(tmp_path: Path) -> None:
    """Rows are readable before and after the sink is closed, then sealed.

    Catches: rows that wait for a close that a notebook never calls for.
    """
    path = tmp_path / "mine"
    with RunSink(path, seed=4) as sink:
        for step in range(300):
            sink(Reading(step))
        assert len(open_runs(path).steps) >= 256
        assert open_runs(path).runs.loc[0, "status"] == "running"
    runs = open_runs(sink.path)
    assert list(runs.steps["step"]) == list(range(300))
    assert set(runs.steps["run_id"]) == {"mine"}
    assert set(runs.steps["seed"]) == {4}
    assert runs.runs.loc[0, "status"] == "done"
    assert (path / "steps.parquet").exists()


def test_a_loop_goes_on_after_its_rows(tmp_path: Path) -> None:
    """Catches: a second session that replaces the first one's readings."""
    for first in (0, 5):
        with RunSink(tmp_path / "mine") as sink:
            for step in range(first, first + 5):
                sink(Reading(step))
    assert list(open_runs(tmp_path / "mine").steps["step"]) == list(range(10))


def test_a_failing_loop_keeps_its_rows(tmp_path: Path) -> None:
    """Catches: rows lost with the exception, or a run that counts as done."""

    def loop() -> None:
        with RunSink(tmp_path / "mine") as sink:
            sink(Reading(0))
            raise ZeroDivisionError("no batch")

    with pytest.raises(ZeroDivisionError):
        loop()
    run = RunDirectory.open(tmp_path / "mine")
    assert run.manifest.status is RunStatus.FAILED
    assert run.manifest.reason == "ZeroDivisionError: no batch"
    assert run.read("steps").rows.num_rows == 1
    with RunSink(tmp_path / "mine") as sink:
        sink(Reading(1))
    assert list(open_runs(tmp_path / "mine").steps["step"]) == [0, 1]


def test_two_loops_in_one_directory_are_refused(tmp_path: Path) -> None:
    """Catches: readings of two loops mixed in one table."""
    with RunSink(tmp_path / "mine"), pytest.raises(RunLockedError, match="one writer"):
        RunSink(tmp_path / "mine")


@pytest.mark.parametrize("lost", ["all", "last"])
def test_lost_segments_of_an_unfinished_loop_are_noticed(
    tmp_path: Path, lost: str
) -> None:
    """A run that was begun again has two segments, and says so.

    Catches: a table of which nothing is left, read as one without rows; its last
    segment gone without a word.
    """

    def failing_loop() -> None:
        with RunSink(tmp_path / "mine") as sink:
            sink(Reading(0))
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing_loop()
    whole = open_runs(tmp_path / "mine")
    assert len(whole.steps) == 2
    assert whole.faults == []
    segments = sorted((tmp_path / "mine" / "segments").glob("steps-*"))
    for path in segments if lost == "all" else segments[-1:]:
        path.unlink()
    runs = open_runs(tmp_path / "mine")
    assert len(runs.steps) == (0 if lost == "all" else 1)
    assert len(runs.faults) == 1
    assert "segment 2 of steps is missing" in runs.faults[0]
