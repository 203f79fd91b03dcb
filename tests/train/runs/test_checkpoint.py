"""States that come back, and checkpoints that are whole or refused."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from noisekit.core.errors import CheckpointError
from noisekit.train.recipes.clock import Position
from noisekit.train.runs.checkpoint import (
    fingerprint,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from noisekit.train.runs.evaluate import Evaluation
from noisekit.train.runs.snapshots import candidate
from noisekit.train.runs.state import TrainState, capture, restore
from tests.train.run_specs import run_spec

SPEC = run_spec(
    optimizer={"name": "adam"},
    snapshots={
        "losses": [0.5],
        "at": {
            "stalled": {
                "stalled": {"patience_epochs": 1.0, "min_relative_decrease": 0.1}
            }
        },
    },
)


def new_state() -> TrainState:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return TrainState.start(SPEC, model)


def train(state: TrainState, updates: int) -> None:
    """Take updates on noise from the global random state, as dropout would."""
    for _ in range(updates):
        state.optimizer.zero_grad()
        state.model(torch.randn(6, 4)).square().mean().backward()
        state.optimizer.step()
        now = state.position
        state.position = Position(now.updates + 1, now.examples + 6, now.cursor + 6)


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    return {**state.weights(), "random": torch.rand(3)}


def test_a_restored_state_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Weights, Adam's moments and count, BatchNorm's statistics and random numbers.

    Catches: an optimizer state left out; Adam's step counts lost; random numbers that
    go on from where the process stands.
    """
    state = new_state()
    train(state, 3)
    save_checkpoint(tmp_path, capture(state, None), spec=SPEC, threads=1)
    train(state, 4)
    wanted = everything(state)

    other = new_state()
    torch.rand(100)
    found = load_checkpoint(tmp_path, spec=SPEC, threads=1)
    assert found.captured is not None
    assert found.faults == ()
    restore(other, None, found.captured)
    assert other.position == Position(3, 18, 18)
    train(other, 4)
    for name, tensor in everything(other).items():
        assert torch.equal(tensor, wanted[name]), name


def test_bookkeeping_comes_back(tmp_path: Path) -> None:
    """Catches: candidates, crossings or watches that a resume forgets."""
    state = new_state()
    state.position = Position(7, 48, 50)
    state.seconds, state.ended = 1.25, "why"
    state.num_rows = {"steps": 7}
    state.taken = ["start"]
    crossing, _ = state.crossings["loss_0.5"].after(0.4)
    state.crossings["loss_0.5"] = crossing
    state.stalls["stalled"] = state.stalls["stalled"].after(2.0, epoch=1.0)
    seen = Evaluation({"train_loss": 0.4})
    state.candidates["loss_0.5"] = candidate(
        state, {"step": 3, "epoch": 0.375}, seen, name="loss_0.5", kind="loss"
    )
    save_checkpoint(tmp_path, capture(state, None), spec=SPEC, threads=1)

    other = new_state()
    found = load_checkpoint(tmp_path, spec=SPEC, threads=1).captured
    assert found is not None
    restore(other, None, found)
    for name in (
        "position",
        "seconds",
        "ended",
        "num_rows",
        "taken",
        "crossings",
        "stalls",
    ):
        assert getattr(other, name) == getattr(state, name), name
    kept, wanted = other.candidates["loss_0.5"], state.candidates["loss_0.5"]
    assert kept.row == wanted.row
    assert kept.weights.keys() == wanted.weights.keys()
    for name, tensor in kept.weights.items():
        assert torch.equal(tensor, wanted.weights[name]), name


def saved(directory: Path, *steps: int) -> list[Path]:
    state = new_state()
    paths = []
    for step in steps:
        state.position = Position(updates=step)
        paths.append(
            save_checkpoint(directory, capture(state, None), spec=SPEC, threads=1)
        )
    return paths


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """Catches: names sorted as text, so that update 1000 is older than 200."""
    saved(tmp_path, 200, 1000, 30)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["update-000000200.safetensors", "update-000001000.safetensors"]
    found = load_checkpoint(tmp_path, spec=SPEC, threads=1).captured
    assert found is not None
    assert found.step == 1000
    remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, damage: str
) -> None:
    """Catches: loading altered weights; giving up though an older one is whole."""
    newest = saved(tmp_path, 10, 20)[-1]
    data = bytearray(newest.read_bytes())
    data[-20] ^= 4
    content = {"flip": bytes(data), "cut": bytes(data[:200]), "empty": b""}[damage]
    newest.write_bytes(content)
    found = load_checkpoint(tmp_path, spec=SPEC, threads=1)
    assert found.captured is not None
    assert found.captured.step == 10
    assert len(found.faults) == 1
    assert "checkpoint update-000000020.safetensors was left out" in found.faults[0]


def test_a_checkpoint_without_its_rows_is_passed_over(tmp_path: Path) -> None:
    """Catches: going on after a gap in the tables."""
    saved(tmp_path, 10, 20)
    found = load_checkpoint(
        tmp_path, spec=SPEC, threads=1, usable=lambda captured: captured.step < 20
    )
    assert found.captured is not None
    assert found.captured.step == 10
    assert found.faults == (
        "checkpoint update-000000020.safetensors was left out: its rows are not all "
        "there",
    )


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    """Catches: hours of training begun anew without a word."""
    for path in saved(tmp_path, 10, 20):
        path.write_bytes(b"x")
    with pytest.raises(
        CheckpointError,
        match=r"needs one whole checkpoint in .*, got 2 damaged .*run it",
    ):
        load_checkpoint(tmp_path, spec=SPEC, threads=1)


def test_no_checkpoint_means_a_start(tmp_path: Path) -> None:
    """Catches: an error for a run that was killed before its first checkpoint."""
    (tmp_path / ".update-000000010.safetensors.tmp").write_bytes(b"half")
    found = load_checkpoint(tmp_path, spec=SPEC, threads=1)
    assert found.captured is None
    assert found.faults == ()


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """Catches: weights of one recipe trained on by another."""
    saved(tmp_path, 10)
    other = run_spec(optimizer={"name": "adam", "learning_rate": 0.2})
    with pytest.raises(CheckpointError, match="needs to be of this recipe, got one of"):
        load_checkpoint(tmp_path, spec=other, threads=1)


def test_other_threads_are_refused(tmp_path: Path) -> None:
    """Catches: sums rounded in another order from the resume on, unnoticed."""
    saved(tmp_path, 10)
    with pytest.raises(
        CheckpointError, match=r"needs 1 threads .*, got 2; set compute\.threads = 1"
    ):
        load_checkpoint(tmp_path, spec=SPEC, threads=2)


def test_how_the_work_is_spread_is_no_other_recipe() -> None:
    """Catches: a resume refused for its number of workers; threads left out."""
    spread = {"workers": 7, "checkpoint_updates": 3, "keep_checkpoints": 1}
    assert fingerprint(run_spec(compute=spread)) == fingerprint(run_spec())
    assert fingerprint(run_spec(compute={"threads": 2})) != fingerprint(run_spec())
    assert fingerprint(run_spec(seed=1)) != fingerprint(run_spec())


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    """Catches: PyTorch's own error, which does not say what to do."""
    state = new_state()
    captured = capture(state, None)
    other = TrainState.start(SPEC, nn.Linear(4, 3))
    with pytest.raises(CheckpointError, match="checkpoint of update 0 needs to fit"):
        restore(other, None, captured)
    shutil.rmtree(tmp_path)
