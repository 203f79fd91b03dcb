"""Worker processes: same bits, one progress stream, and no death takes the others."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from noisekit.core.errors import RunFailedError
from noisekit.records import RunDirectory, Runs
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.sweeps import executors, sweep
from noisekit.train.sweeps.run_status import status

TINY = Path(__file__).parents[1] / "tiny.toml"


def test_processes_give_the_same_bits_as_one(tmp_path: Path) -> None:
    """Two workers and none end in the same weights, and their events all arrive.

    Catches: another thread count or random state in a worker; lost events.
    """
    ended = []
    recipe = load_recipe(TINY)
    here = sweep.run(recipe, tmp_path / "here", workers=0)
    there = sweep.run(
        recipe, tmp_path / "there", workers=2, progress=lambda e: ended.append(e)
    )
    for run_id in here.runs["run_id"]:
        one, other = (_final(runs, run_id) for runs in (here, there))
        assert one == other, run_id
    done = {event.run_id for event in ended if event.phase == "done"}
    assert done == set(here.runs["run_id"])


def _final(runs: Runs, run_id: str) -> bytes:
    weights = runs.weights(run_id, "final")
    return b"".join(np.ascontiguousarray(weights[k]).tobytes() for k in sorted(weights))


def test_killed_worker_takes_only_its_own_run(tmp_path: Path) -> None:
    """The run is marked as failed with the cause; a new worker does the others.

    Catches: a broken pool that fails every run; blaming the wrong one.
    """
    killed = []

    def kill(event: ProgressEvent) -> None:
        if event.run_id == "fast-seed0" and event.phase == "train" and not killed:
            (worker,) = multiprocessing.active_children()
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    # Long enough that the signal finds the run at work.
    long = {"training.stop.updates": "4000", "evaluation.every.updates": "1000"}
    recipe = load_recipe(TINY, overrides=long)
    with pytest.raises(RunFailedError) as caught:
        sweep.run(recipe, tmp_path, workers=1, progress=kill)
    assert (
        "1 of 4 runs failed; the others are complete:\n  fast-seed0: its worker "
        "process was killed by SIGKILL, perhaps for lack of memory"
    ) in str(caught.value)
    assert [row.status for row in status(tmp_path)] == [
        "done",
        "failed",
        "done",
        "done",
    ]
    manifest = RunDirectory.open(tmp_path / "runs" / "fast-seed0").manifest
    assert "SIGKILL" in manifest.reason


def test_interrupt_stops_the_workers(tmp_path: Path) -> None:
    """After Ctrl-C no worker is left, and resuming completes the set.

    Catches: orphans that go on training and hold the run's lock.
    """

    def interrupt(event: ProgressEvent) -> None:
        raise KeyboardInterrupt

    recipe = load_recipe(TINY)
    with pytest.raises(KeyboardInterrupt, match="noisekit resume"):
        sweep.run(recipe, tmp_path, workers=2, progress=interrupt)
    assert multiprocessing.active_children() == []
    sweep.resume(tmp_path, workers=0)
    assert {row.status for row in status(tmp_path)} == {"done"}


def test_no_more_workers_than_runs(tmp_path: Path) -> None:
    """Two runs start two workers, however many are allowed.

    Catches: forty processes for two runs.
    """
    counts = []
    sweep.run(
        load_recipe(TINY),
        tmp_path,
        workers=9,
        seeds=1,
        progress=lambda _: counts.append(len(multiprocessing.active_children())),
    )
    assert max(counts) == 2


PARENT = """
import sys
from noisekit.train import load_recipe, run
if __name__ == "__main__":
    long = {"training.stop.updates": "100000000", "seeds.count": "1"}
    run(load_recipe(sys.argv[1], overrides=long), sys.argv[2], workers=1)
"""


def test_worker_dies_with_its_parent(tmp_path: Path) -> None:
    """After ``kill -9`` of the parent the run is free within seconds.

    Catches: an orphan that trains on and keeps the run locked against ``resume``.
    """
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(TINY), str(tmp_path / "set")]
    with subprocess.Popen(command) as parent:
        _until(lambda: _first(tmp_path / "set") == "running")
        parent.kill()
        parent.wait()
    _until(lambda: _first(tmp_path / "set") == "interrupted")


def _first(path: Path) -> str:
    return status(path)[0].status if (path / "set.json").exists() else ""


def _until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.05)


UNGUARDED = """
import sys
from noisekit.train import load_recipe, run
run(load_recipe(sys.argv[1]), sys.argv[2], workers=1)
"""


def test_unguarded_script_is_told_what_to_do(tmp_path: Path) -> None:
    """Workers import the script that started them: without a guard they cannot start.

    Catches: starting workers again and again; an error that blames a run.
    """
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    command = [sys.executable, str(script), str(TINY), str(tmp_path / "set")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "before it could take a run" in ended.stderr
    assert "under `if __name__ == '__main__':`" in ended.stderr


def test_thread_variables_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers inherit the recipe's thread count, and the caller's comes back.

    Catches: leaving the caller's environment changed.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with executors._thread_variables(3):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
