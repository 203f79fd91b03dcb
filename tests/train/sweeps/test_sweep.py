"""Sweeps: what they execute, leave alone, refuse and report."""

from pathlib import Path

import pytest
import torch

from noisekit.core.errors import (
    DataNotFoundError,
    RunDirectoryError,
    RunFailedError,
    RunLockedError,
    UsageError,
)
from noisekit.records import exclusive_lock, read_set, write_set
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.sweeps import sweep
from noisekit.train.sweeps.run_status import recorded_recipe, status

TINY = Path(__file__).parents[1] / "tiny.toml"
RUNS = ["slow-seed0", "fast-seed0", "slow-seed1", "fast-seed1"]


def tiny(**overrides: str) -> Recipe:
    """Return the tiny recipe with some keys changed."""
    settings = {key.replace("__", "."): text for key, text in overrides.items()}
    return load_recipe(TINY, overrides=settings)


class Heard(list[ProgressEvent]):
    """Collects the events of a sweep."""

    __call__ = list.append

    def ended(self) -> list[tuple[str, str]]:
        """Return how each run ended, in order."""
        ends = {"done", "failed", "diverged"}
        return [(e.run_id, e.phase) for e in self if e.phase in ends]


def test_every_arm_runs_at_every_seed(tmp_path: Path) -> None:
    """The set has one directory per run, and its recipe as it was asked for.

    Catches: a run that is executed twice or left out.
    """
    heard = Heard()
    recipe = tiny()
    runs = sweep.run(recipe, tmp_path / "set", workers=0, progress=heard)
    assert heard.ended() == [(run_id, "done") for run_id in RUNS]
    assert set(runs.runs["run_id"]) == set(RUNS)
    assert runs.runs.set_index("run_id")["learning_rate"]["fast-seed1"] == 0.2
    assert recorded_recipe(tmp_path / "set") == recipe
    content = read_set(tmp_path / "set")
    assert content["runs"] == RUNS
    assert content["data"]["name"] == "gaussian"
    assert {"torch", "noisekit"} <= set(content["versions"])


def test_arms_of_a_seed_start_from_the_same_weights(tmp_path: Path) -> None:
    """Seeds pair the arms: same start, another end; another seed, another start.

    Catches: a start that depends on the arm or on the order of the runs.
    """
    runs = sweep.run(tiny(), tmp_path, workers=0)

    def weights(run_id: str, snapshot: str) -> torch.Tensor:
        tensors = runs.weights(run_id, snapshot)
        return torch.cat(
            [torch.from_numpy(tensors[k]).flatten() for k in sorted(tensors)]
        )

    assert torch.equal(weights("slow-seed0", "start"), weights("fast-seed0", "start"))
    assert not torch.equal(
        weights("slow-seed0", "final"), weights("fast-seed0", "final")
    )
    assert not torch.equal(
        weights("slow-seed0", "start"), weights("slow-seed1", "start")
    )


def test_complete_runs_are_left_alone(tmp_path: Path) -> None:
    """The same recipe into the same place executes only what is missing.

    Catches: starting again from nothing; refusing to go on.
    """
    sweep.run(tiny(), tmp_path, workers=0)
    manifest = tmp_path / "runs" / "slow-seed0" / "manifest.json"
    before = manifest.read_bytes()
    heard = Heard()
    sweep.run(tiny(compute__workers="2"), tmp_path, workers=0, progress=heard)
    assert heard == []
    assert manifest.read_bytes() == before


def test_number_of_seeds_and_device_come_from_the_caller(tmp_path: Path) -> None:
    """``seeds=`` and ``device=`` are part of what is recorded.

    Catches: running with them and recording the recipe's own.
    """
    runs = sweep.run(tiny(), tmp_path, workers=0, seeds=1, device="cpu:0")
    assert set(runs.runs["seed"]) == {0}
    recipe = recorded_recipe(tmp_path)
    assert (recipe.seeds.count, recipe.compute.device) == (1, "cpu:0")


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    """Runs of two recipes never share a directory, also where only seeds are added.

    Catches: adding seeds until it resolves; mixing learning rates under one name.
    """
    sweep.run(tiny(), tmp_path, workers=0, seeds=1)
    with pytest.raises(
        UsageError,
        match=r"holds runs of another recipe, which differs in optimizer.momentum, "
        r"seeds.count; choose another --out, or finish those with `noisekit resume",
    ):
        sweep.run(tiny(optimizer__momentum="0.5"), tmp_path, workers=0)


def test_foreign_directory_is_refused(tmp_path: Path) -> None:
    """What is not a set of runs is not written into.

    Catches: filling somebody's home directory.
    """
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match=r"new or empty directory, got .*other files"):
        sweep.run(tiny(), tmp_path, workers=0)
    with pytest.raises(UsageError, match=r"runs need a directory, got the file .*tex"):
        sweep.run(tiny(), tmp_path / "thesis.tex", workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_the_machine_lacks_is_said_before_the_first_run(tmp_path: Path) -> None:
    """Missing data or a missing device leave nothing behind.

    Catches: forty runs that fail one after the other for the same reason.
    """
    missing = {"data__name": "mnist", "data__path": str(tmp_path / "nowhere")}
    with pytest.raises(DataNotFoundError, match="Ways to get it"):
        sweep.run(tiny(**missing), tmp_path / "set", workers=0)
    with pytest.raises(
        UsageError, match=r"needs a device of this machine, got 'cuda:99' .*cpu always"
    ):
        sweep.run(tiny(), tmp_path / "set", workers=0, device="cuda:99")
    assert not (tmp_path / "set").exists()


def test_diverged_run_is_a_result(tmp_path: Path) -> None:
    """A loss that leaves the numbers is recorded, and the sweep ends well.

    Catches: counting it as failed; resuming it for ever.
    """
    arms = '[{name="slow"}, {name="wild", set={"optimizer.learning_rate"=1e30}}]'
    heard = Heard()
    runs = sweep.run(tiny(arms=arms), tmp_path, workers=0, seeds=1, progress=heard)
    assert heard.ended() == [("slow-seed0", "done"), ("wild-seed0", "diverged")]
    assert runs.runs.set_index("run_id")["status"]["wild-seed0"] == "diverged"
    heard.clear()
    sweep.resume(tmp_path, workers=0, progress=heard)
    assert heard == []


def test_failed_run_is_named_and_can_be_resumed(tmp_path: Path) -> None:
    """The others complete; the error names run, cause and remedy; then it goes on.

    Catches: stopping at the first failure; losing its cause.
    """
    path = tmp_path / "set"
    sweep.run(tiny(), path, workers=0)
    for run_id in ("fast-seed0", "slow-seed1"):
        (path / "runs" / run_id / "manifest.json").unlink()
        for file in (path / "runs" / run_id).rglob("*"):
            if file.is_file():
                file.unlink()
    damaged = path / "runs" / "fast-seed0" / "manifest.json"
    damaged.write_text("{")
    heard = Heard()
    with pytest.raises(RunFailedError) as caught:
        sweep.resume(path, workers=0, progress=heard)
    message = str(caught.value)
    assert message.startswith("1 of 4 runs failed; the others are complete:\n")
    assert f"  fast-seed0: {damaged} needs to hold JSON, got a damaged file" in message
    assert message.endswith(f"go on with `noisekit resume {path}`.")
    assert heard.ended() == [("fast-seed0", "failed"), ("slow-seed1", "done")]
    assert [row.status for row in status(path)] == ["done", "damaged", "done", "done"]

    damaged.unlink()
    heard.clear()
    sweep.resume(path, workers=0, progress=heard)
    assert heard.ended() == [("fast-seed0", "done")]


def test_interrupted_sweep_says_how_to_go_on(tmp_path: Path) -> None:
    """Ctrl-C keeps what was computed, and says the command.

    Catches: a run that is left locked or counted as failed.
    """

    def interrupt(event: ProgressEvent) -> None:
        if event.run_id == "fast-seed0":
            raise KeyboardInterrupt

    path = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt, match=f"go on with `noisekit resume {path}`"):
        sweep.run(tiny(), path, workers=0, progress=interrupt)
    assert [row.status for row in status(path)] == [
        "done",
        "interrupted",
        "created",
        "created",
    ]
    sweep.resume(path, workers=0)
    assert {row.status for row in status(path)} == {"done"}


def test_status_counts_updates_and_snapshots(tmp_path: Path) -> None:
    """A row says how far a run is, in the command's columns."""
    sweep.run(tiny(measure__everywhere='["grad_norm"]'), tmp_path, workers=0, seeds=1)
    row = status(tmp_path)[0]
    assert row.cells()[:4] == ("slow-seed0", "done", "12/12", "2")


def test_two_sweeps_on_one_directory_are_refused(tmp_path: Path) -> None:
    """The second is told about the first."""
    sweep.run(tiny(), tmp_path, workers=0)
    with (
        exclusive_lock(tmp_path / "lock", what="set"),
        pytest.raises(RunLockedError, match="the set of runs"),
    ):
        sweep.resume(tmp_path, workers=0)


def test_resume_needs_a_set(tmp_path: Path) -> None:
    """A directory without a set, and a set whose recipe is damaged, are refused."""
    with pytest.raises(RunDirectoryError, match=r"set.json is missing"):
        sweep.resume(tmp_path)
    sweep.run(tiny(), tmp_path, workers=0)
    content = read_set(tmp_path)
    text = (tmp_path / "set.json").read_text()
    (tmp_path / "set.json").write_text(text.replace('"mlp"', '"mpl"'))
    with pytest.raises(RunDirectoryError, match=r"set\.json .* was altered since"):
        sweep.resume(tmp_path)
    content["recipe"]["model"]["name"] = "mpl"
    write_set(tmp_path, content)
    with pytest.raises(
        RunDirectoryError, match=r"one whose model.name does not fit .*new directory"
    ):
        sweep.resume(tmp_path)
