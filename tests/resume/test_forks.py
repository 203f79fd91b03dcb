"""Runs that start from other runs, killed: alone, and as a whole sweep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from noisekit.records import Manifest, RunDirectory
from noisekit.train.runs.loop import train_run
from tests.resume.test_resume import assert_same_run, kill_everywhere
from tests.train.run_specs import run_spec

SECTIONS = {
    "model": {"name": "mlp", "hidden": [8], "norm": "batch"},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
    "snapshots": {"losses": [2.0], "sustain": 2, "at": {"mid": {"updates": 9}}},
    "training": {"batch_size": 32, "stop": {"updates": 18}},
    "evaluation": {"every": {"updates": 3}},
    "measure": {"everywhere": ["grad_norm"], "examples": []},
    "compute": {"checkpoint_updates": 4},
}
RECIPE = """
format = 2
name = "forks"
question = "Do forks survive?"
data = { name = "digits", train = 128, validation = 64, test = 64 }
model = { name = "mlp", hidden = [8] }
optimizer = { name = "sgd", learning_rate = 0.1, momentum = 0.9 }
training = { batch_size = 32, stop = { updates = 8 } }
evaluation = { every = { updates = 2 } }
snapshots = { losses = [2.2], sustain = 2, at = { mid = { updates = 4 } } }
probe = { every = 0 }
measure = { everywhere = ["grad_norm"], examples = [] }
compute = { checkpoint_updates = 5 }
seeds = { count = 1 }
[[arms]]
name = "late"
set = { "start.arm" = "fork", "start.snapshot" = "final" }
[[arms]]
name = "fork"
[arms.set.start]
arm = "trunk"
snapshot = "loss_2.2"
optimizer = "keep"
[[arms]]
name = "trunk"
"""


@pytest.mark.slow
def test_a_fork_killed_anywhere_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Killed at each kind of moment, Adam's moments and BatchNorm's buffers taken over.

    Catches: a fork that begins anew from its own seed, or whose optimizer does; a start
    that is taken over again on top of a checkpoint.
    """
    trunk = run_spec(
        **SECTIONS, run_id="trunk-seed0", arm="trunk", kept_optimizers=["mid"]
    )
    manifest = Manifest(run_id=trunk.run_id, arm=trunk.arm, seed=0)
    train_run(trunk, RunDirectory.create(tmp_path / trunk.run_id, manifest))
    start = {"arm": "trunk", "snapshot": "mid", "optimizer": "keep", "order": 1}
    fork = run_spec(**SECTIONS, run_id="fork-seed0", arm="fork", start=start)
    moments = kill_everywhere(fork, tmp_path)
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == len(moments) + 1
    for path in killed:
        assert_same_run(path, tmp_path / "unbroken")
        run, whole = RunDirectory.open(path), RunDirectory.open(tmp_path / "unbroken")
        assert run.manifest.origin == whole.manifest.origin
        assert run.manifest.origin["snapshot"] == "mid"


def kill_sweeps(folder: Path, *, every: int) -> list[str]:
    """Kill whole sweeps at every so many events; check all bits; return the moments."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.resume.killing_sweeps"),
            *(str(folder), str(recipe), str(every)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    moments: list[str] = json.loads(done.stdout)
    killed = sorted(folder.glob("killed-*"))
    assert len(killed) == len(moments) + 1
    for path in killed:
        for name in ("trunk-seed0", "fork-seed0", "late-seed0"):
            whole = folder / "unbroken/runs" / name
            assert_same_run(path / "runs" / name, whole)
            origin = RunDirectory.open(path / "runs" / name).manifest.origin
            assert origin == RunDirectory.open(whole).manifest.origin
    return moments


@pytest.mark.slow
def test_a_sweep_killed_anywhere_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Killed in the trunk, while forks wait for its snapshot, and in the forks.

    The trunk's fifth update has a checkpoint in which the crossing of the fourth, and
    the optimizer's state there, wait for the next evaluation.

    Catches: a fork that begins before its trunk's snapshot is settled; a trunk that is
    trained anew with other bits; an optimizer's state of another update than the
    weights.
    """
    moments = kill_sweeps(tmp_path, every=17)
    told = " ".join(moments)
    for run in ("trunk-seed0 train", "fork-seed0", "late-seed0"):
        assert run in told
