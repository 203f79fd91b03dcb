"""Many runs as tidy tables, finished or not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from noisekit.core.errors import NewerFormatError, RunDirectoryError
from noisekit.records import (
    Manifest,
    RunDirectory,
    open_runs,
    read_set,
    save_tensors,
    write_set,
)


def make_run(folder: Path, arm: str, seed: int, *, sealed: bool) -> RunDirectory:
    run = RunDirectory.create(
        folder / f"{arm}-seed{seed}",
        Manifest(
            run_id=f"{arm}-seed{seed}",
            arm=arm,
            seed=seed,
            factors={"batch_size": 16 if arm == "small" else 128},
            costs={"train_seconds": 1.5},
        ),
    )
    with run.lock():
        with run.writer("evaluations") as writer:
            writer.append({"step": 0, "train_loss": 2.3})
            writer.append({"step": 10, "train_loss": 1.0 + seed})
        if sealed:
            list(run.seal())
    return run


@pytest.fixture
def set_dir(tmp_path: Path) -> Path:
    """A set of runs of which some are sealed and others still going on."""
    write_set(tmp_path, {"recipe": {"name": "toy"}})
    for arm in ("large", "small"):
        for seed in (0, 1):
            make_run(tmp_path / "runs", arm, seed, sealed=seed == 0)
    return tmp_path


def test_runs_are_joined_with_their_identity(set_dir: Path) -> None:
    """Sealed and unsealed runs give one table, each row with run, arm and seed.

    Catches: runs that go on left out; identities of one run on the rows of another.
    """
    runs = open_runs(set_dir)
    assert len(runs) == 4
    assert runs.recipe == {"name": "toy"}
    assert runs.set_dir == set_dir
    frame = runs.evaluations
    assert list(frame.columns[:4]) == ["run_id", "arm", "seed", "step"]
    last = frame[frame["step"] == 10].set_index("run_id")
    assert last["train_loss"].to_dict() == {
        "large-seed0": 1.0,
        "large-seed1": 2.0,
        "small-seed0": 1.0,
        "small-seed1": 2.0,
    }
    assert last.loc["small-seed1", "arm"] == "small"
    assert last.loc["small-seed1", "seed"] == 1


def test_factors_and_costs_stand_beside_each_run(set_dir: Path) -> None:
    """Catches: factors that overwrite the run's own columns, or are lost."""
    frame = open_runs(set_dir).runs.set_index("run_id")
    assert frame.loc["large-seed0", "batch_size"] == 128
    assert frame.loc["small-seed1", "batch_size"] == 16
    assert frame.loc["small-seed1", "status"] == "created"
    assert frame.loc["small-seed1", "train_seconds"] == 1.5


def test_a_table_without_rows_keeps_its_types(set_dir: Path) -> None:
    """Catches: columns of objects that later arithmetic stumbles over."""
    frame = open_runs(set_dir).measurements
    assert frame.empty
    assert frame["value"].dtype == np.float64
    assert frame["seed"].dtype == np.int64


def test_one_run_or_several_can_be_opened(set_dir: Path) -> None:
    """Catches: a reader that only knows whole sets."""
    one = open_runs(set_dir / "runs" / "small-seed0")
    assert list(one.runs["run_id"]) == ["small-seed0"]
    two = open_runs(
        [set_dir / "runs" / "small-seed0", set_dir / "runs" / "large-seed1"]
    )
    assert list(two.runs["run_id"]) == ["small-seed0", "large-seed1"]
    assert len(two.evaluations) == 4


def test_a_damaged_run_is_left_out_and_named(set_dir: Path) -> None:
    """Catches: one broken file that hides all other runs, or a silent omission."""
    (set_dir / "runs" / "small-seed0" / "manifest.json").write_text("{")
    runs = open_runs(set_dir)
    assert len(runs) == 3
    assert len(runs.faults) == 1
    assert runs.faults[0].startswith("small-seed0 is left out: ")


def test_faults_of_runs_and_tables_are_collected(set_dir: Path) -> None:
    """Catches: faults in a manifest, or torn segments, that nobody gets to see."""
    run = RunDirectory.open(set_dir / "runs" / "small-seed0")
    with run.lock():
        run.add_fault("resumed elsewhere")
    segment = set_dir / "runs/small-seed1/segments/evaluations-0001.segment"
    segment.write_bytes(segment.read_bytes()[:-1])
    runs = open_runs(set_dir)
    assert len(runs.evaluations) == 6
    assert runs.faults == [
        "small-seed0: resumed elsewhere",
        "small-seed1: evaluations-0001.segment is torn after 0 rows, which are kept",
    ]


def test_nothing_to_read_says_what_was_looked_for(tmp_path: Path) -> None:
    """Catches: empty tables from a mistyped path."""
    with pytest.raises(
        RunDirectoryError, match=r"give the directory that has set\.json"
    ):
        open_runs(tmp_path)


def test_a_newer_set_is_refused(set_dir: Path) -> None:
    """Catches: a set's format that nobody looks at."""
    (set_dir / "set.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(NewerFormatError, match=r"set\.json has format 7"):
        open_runs(set_dir)


def test_a_set_without_format_is_damaged(set_dir: Path) -> None:
    """Catches: taking any JSON object for a set."""
    (set_dir / "set.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="needs a format number, got None"):
        read_set(set_dir)


def test_weights_come_back_by_name(set_dir: Path) -> None:
    """Catches: reading another run's snapshot."""
    runs = open_runs(set_dir)
    weights = {"layer.weight": np.arange(6.0).reshape(2, 3)}
    path = set_dir / "runs/large-seed0/snapshots/final.safetensors"
    save_tensors(path, weights, {"step": "10"})
    found = runs.weights("large-seed0", "final")
    np.testing.assert_array_equal(found["layer.weight"], weights["layer.weight"])
    with pytest.raises(
        RunDirectoryError, match=r"one of the runs large-seed0, .*got 'x'"
    ):
        runs.weights("x", "final")


def test_reading_loads_no_torch(set_dir: Path) -> None:
    """Catches: an import, however indirect, that makes reading slow and heavy."""
    script = (
        "import sys; from noisekit.records import open_runs; "
        f"open_runs({str(set_dir)!r}).evaluations; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
