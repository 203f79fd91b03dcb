"""Whole runs: what they compute, what they keep, how they end."""

import errno
import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from pydantic import JsonValue
from torch import nn
from torch.nn.functional import cross_entropy

from noisekit.core.errors import RunLockedError, StorageError, UsageError
from noisekit.core.randomness import stream
from noisekit.records import RunDirectory, Runs, RunStatus, open_runs
from noisekit.train.data.datasets import load_data
from noisekit.train.models import build_model
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.loop import train_run
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.runs.snapshots import load_weights
from tests.reference.training import mean_loss_and_error, train_by_hand
from tests.train.run_specs import new_run, run_spec


def run_of(spec: RunSpec, folder: Path) -> Runs:
    run = new_run(spec, folder)
    train_run(spec, run)
    return open_runs(run.path)


def by_snapshot(runs: Runs) -> pd.DataFrame:
    return runs.snapshots.set_index("snapshot")


def weights_at(runs: Runs, snapshot: str) -> torch.Tensor:
    found = load_weights(runs.directories[0], snapshot)
    return torch.cat([tensor.reshape(-1).double() for tensor in found.values()])


def start_of(
    spec: RunSpec, *, dtype: torch.dtype
) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The model before training, and the batches of its first four epochs."""
    data = load_data(spec.data)
    model = build_model(
        spec.model, input_shape=data.input_shape, num_classes=10, seed=spec.seed
    ).to(dtype)
    batches = []
    for epoch in range(4):
        order = torch.randperm(128, generator=stream(spec.seed, "order", epoch))
        batches += [
            (data.train.inputs[part].to(dtype), data.train.targets[part])
            for part in order.split(16)
        ]
    return model, batches


def first_loss_that_is_no_number(spec: RunSpec) -> int:
    model, batches = start_of(spec, dtype=torch.float32)
    for update, (inputs, targets) in enumerate(batches, start=1):
        if not cross_entropy(model(inputs), targets).isfinite():
            return update
        rate = spec.optimizer.learning_rate
        train_by_hand(model, [(inputs, targets)], rate=rate)
    raise AssertionError("all losses are numbers")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("microbatch", [None, 4])
def test_a_run_is_plain_gradient_descent(
    momentum: float, microbatch: int | None, tmp_path: Path
) -> None:
    """Ten updates equal those by hand, on the same weights and batches, in float64.

    Catches: micro-batches added instead of averaged; gradients not cleared; rate or
    momentum applied twice; batches of another epoch.
    """
    spec = run_spec(
        optimizer={"momentum": momentum},
        training={"microbatch": microbatch, "stop": {"updates": 10}},
        compute={"dtype": "float64"},
    )
    runs = run_of(spec, tmp_path)

    model, batches = start_of(spec, dtype=torch.float64)
    train_by_hand(model, batches[:10], rate=0.1, momentum=momentum)
    wanted = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(weights_at(runs, "final"), wanted, rtol=1e-10, atol=0)
    train = load_data(spec.data).train
    loss, error = mean_loss_and_error(model, train.inputs.double(), train.targets)
    final = by_snapshot(runs).loc["final"]
    assert abs(final["train_loss"] - loss) < 1e-10
    assert final["train_error"] == error
    assert final["step"] == 10
    assert final["examples_seen"] == 160
    assert final["epoch"] == 1.25


def test_arms_start_alike_and_differ_in_what_they_set(tmp_path: Path) -> None:
    """Two arms of a seed share weights and data order, two seeds do not.

    Catches: starting weights drawn from a stream that the arm moves.
    """
    small = run_of(run_spec(), tmp_path)
    large = run_of(run_spec(run_id="large", training={"batch_size": 64}), tmp_path)
    other = run_of(run_spec(run_id="other", seed=1), tmp_path)
    start = weights_at(small, "start")
    assert torch.equal(start, weights_at(large, "start"))
    assert not torch.equal(start, weights_at(other, "start"))


def test_attaching_the_probe_changes_no_bit(tmp_path: Path) -> None:
    """Catches: a probe that costs a random number or rounds a gradient."""
    plain = run_of(run_spec(), tmp_path)
    probed = run_of(run_spec(run_id="probed", probe={"every": 4}), tmp_path)
    assert torch.equal(weights_at(plain, "final"), weights_at(probed, "final"))
    assert plain.steps.empty
    steps = probed.steps
    assert list(steps["step"]) == list(range(1, 41, 4))
    assert (steps["variance_trace"] > 0).all()
    assert (steps["num_units"] == 16).all()
    assert (steps["learning_rate"] == 0.1).all()
    assert steps["batch_loss"].iloc[0] == pytest.approx(2.3, abs=0.2)
    assert list(steps["epoch"]) == [step * 16 / 128 for step in steps["step"]]


def test_layers_are_written_where_asked_for(tmp_path: Path) -> None:
    """Catches: parts that do not add up to the whole."""
    spec = run_spec(probe={"every": 20, "layers": True})
    runs = run_of(spec, tmp_path)
    total = runs.layers.groupby("step")["grad_sq_norm"].sum()
    wanted = runs.steps.set_index("step")["grad_sq_norm"]
    assert total.to_dict() == pytest.approx(wanted.to_dict())


def test_evaluations_are_regular_and_the_last_is_there(tmp_path: Path) -> None:
    """Catches: an evaluation short of the end; step 0 left out."""
    spec = run_spec(evaluation={"every": {"updates": 16}})
    assert list(run_of(spec, tmp_path).evaluations["step"]) == [0, 16, 32, 40]


def test_epochs_and_updates_give_snapshots(tmp_path: Path) -> None:
    """A planned snapshot is the run's prefix: a shorter run ends in its weights.

    Catches: snapshots one update late.
    """
    spec = run_spec(
        snapshots={"at": {"early": {"epochs": 1.5}, "later": {"updates": 21}}}
    )
    runs = run_of(spec, tmp_path)
    assert by_snapshot(runs)["step"].to_dict() == {
        "start": 0,
        "early": 12,
        "later": 21,
        "final": 40,
    }
    assert list(runs.snapshots["kind"]) == ["start", "epochs", "updates", "final"]
    short = run_spec(run_id="short", training={"stop": {"updates": 21}})
    assert torch.equal(
        weights_at(runs, "later"), weights_at(run_of(short, tmp_path), "final")
    )


def test_a_crossing_has_the_weights_of_its_first_evaluation(tmp_path: Path) -> None:
    """The snapshot's loss is that of the first of three evaluations below the level.

    Catches: weights of the confirming evaluation under the first one's row; a
    crossing that the end of training leaves unconfirmed.
    """
    spec = run_spec(
        evaluation={"every": {"updates": 2}},
        snapshots={"losses": [1.5, 0.5, 0.001], "sustain": 3},
        training={"stop": {"updates": 160}},
    )
    runs = run_of(spec, tmp_path)
    losses = runs.evaluations.set_index("step")["train_loss"]
    snapshots = by_snapshot(runs)
    assert "loss_0.001" not in snapshots.index
    for level in (1.5, 0.5):
        below = (losses <= level).astype(int)
        in_a_row = below + below.shift(-1) + below.shift(-2)
        step = in_a_row.index[in_a_row == 3][0]
        row = snapshots.loc[f"loss_{level:g}"]
        assert row["step"] == step
        assert row["train_loss"] == losses[step]
        data = load_data(spec.data).train
        model = build_model(spec.model, input_shape=(1, 8, 8), num_classes=10, seed=0)
        model.load_state_dict(load_weights(runs.directories[0], f"loss_{level:g}"))
        found, _ = mean_loss_and_error(model, data.inputs, data.targets)
        assert found == pytest.approx(losses[step], rel=1e-5)


def test_a_reached_loss_ends_the_run(tmp_path: Path) -> None:
    """Catches: a run that goes on to its bound."""
    spec = run_spec(training={"stop": {"updates": 500, "loss": 1.0}})
    runs = run_of(spec, tmp_path)
    last = runs.evaluations.iloc[-1]
    assert last["train_loss"] <= 1.0
    assert runs.evaluations.iloc[-2]["train_loss"] > 1.0
    assert by_snapshot(runs).loc["final", "step"] == last["step"]
    assert runs.runs.loc[0, "reason"] == "the training loss reached 1"


def test_a_stalled_loss_ends_the_run_or_only_marks_it(tmp_path: Path) -> None:
    """Catches: one watch for both, so that marking a stall ends the run."""
    stalled: JsonValue = {"patience_epochs": 1.0, "min_relative_decrease": 0.3}
    marked = run_of(
        run_spec(snapshots={"at": {"stalled": {"stalled": stalled}}}), tmp_path
    )
    ended = run_of(
        run_spec(
            run_id="ended", training={"stop": {"updates": 40, "stalled": stalled}}
        ),
        tmp_path,
    )
    step = by_snapshot(marked).loc["stalled", "step"]
    assert by_snapshot(marked).loc["final", "step"] == 40
    assert by_snapshot(ended).loc["final", "step"] == step < 40
    assert ended.runs.loc[0, "reason"].startswith("the training loss stalled at ")


def test_a_diverged_run_is_a_result(tmp_path: Path) -> None:
    """The update of the first loss that is no number is named, and the run sealed.

    Catches: an exception that stops a sweep; weights that are no numbers kept as
    final; the update of the evaluation in place of the batch's own.
    """
    spec = run_spec(
        optimizer={"learning_rate": 1e12},
        evaluation={"every": {"updates": 40}},
        snapshots={"at": {"late": {"updates": 30}}},
        measure={"everywhere": ["grad_norm"]},
    )
    run = new_run(spec, tmp_path)
    events: list[ProgressEvent] = []
    outcome = train_run(spec, run, progress=events.append)
    assert outcome.status is RunStatus.DIVERGED
    update = first_loss_that_is_no_number(spec)
    assert 1 < update < 30
    assert outcome.reason == f"the batch loss was nan at update {update}"
    runs = open_runs(run.path)
    assert list(runs.snapshots["snapshot"]) == ["start"]
    assert list(runs.measurements["snapshot"]) == ["start"]
    assert events[-1].phase == "diverged"
    assert not list((run.path / "segments").glob("*"))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    """Catches: a resume of a whole set that trains what is done."""
    spec = run_spec()
    run = new_run(spec, tmp_path)
    train_run(spec, run)
    before = (run.path / "snapshots/final.safetensors").stat().st_mtime_ns
    events: list[ProgressEvent] = []
    outcome = train_run(spec, RunDirectory.open(run.path), progress=events.append)
    assert outcome.status is RunStatus.DONE
    assert [event.phase for event in events] == ["done"]
    assert (run.path / "snapshots/final.safetensors").stat().st_mtime_ns == before


def test_two_runs_in_one_directory_are_refused(tmp_path: Path) -> None:
    """Catches: two processes that write over each other."""
    spec = run_spec()
    run = new_run(spec, tmp_path)
    with run.lock(), pytest.raises(RunLockedError, match="needs to have one writer"):
        train_run(spec, RunDirectory.open(run.path))


def test_a_failure_is_on_record_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk ends the run as failed; with space again it goes on, unharmed.

    Catches: a run that looks as if it were still going on; a failure that sticks.
    """
    spec = run_spec(compute={"checkpoint_updates": 8})
    whole = run_of(spec, tmp_path / "whole")
    run = new_run(spec, tmp_path)
    replace, count = Path.replace, 0

    def full_after_a_while(self: Path, target: Path) -> Path:
        nonlocal count
        count += target.parent.name == "checkpoints"
        if count == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_after_a_while)
        with pytest.raises(StorageError, match=r"No space left on device.*then resume"):
            train_run(spec, run)
    failed = RunDirectory.open(run.path)
    assert failed.manifest.status in {RunStatus.FAILED, RunStatus.RUNNING}
    outcome = train_run(spec, failed)
    assert outcome.status is RunStatus.DONE
    assert torch.equal(
        weights_at(open_runs(run.path), "final"), weights_at(whole, "final")
    )
    pd.testing.assert_frame_equal(open_runs(run.path).evaluations, whole.evaluations)


def test_a_corrupt_checkpoint_costs_time_and_no_bit(tmp_path: Path) -> None:
    """An older one is gone on from, the fault is on record, the bits are the same.

    Catches: rows after the older checkpoint kept twice; training begun anew.
    """
    spec = run_spec(compute={"checkpoint_updates": 10}, probe={"every": 3})
    whole = run_of(spec, tmp_path / "whole")
    run = new_run(spec, tmp_path)

    class StopError(Exception):
        """Stands for any error in the middle of a run."""

    def stop(event: ProgressEvent) -> None:
        if event.done == 30 and event.detail == "checkpoint saved":
            raise StopError

    with pytest.raises(StopError):
        train_run(spec, run, progress=stop)
    newest = run.checkpoints / "update-000000030.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    events: list[ProgressEvent] = []
    train_run(spec, RunDirectory.open(run.path), progress=events.append)
    assert events[0].done == 24
    found = open_runs(run.path)
    pd.testing.assert_frame_equal(found.steps, whole.steps)
    pd.testing.assert_frame_equal(found.evaluations, whole.evaluations)
    assert torch.equal(weights_at(found, "final"), weights_at(whole, "final"))
    assert len(found.faults) == 1
    assert "update-000000030.safetensors was left out" in found.faults[0]


def test_costs_are_in_the_manifest(tmp_path: Path) -> None:
    """Catches: costs that only the last process of a run knows."""
    spec = run_spec(
        measure={
            "everywhere": ["lambda_max"],
            "settings": {"lambda_max": {"max_matvecs": 50}},
        }
    )
    run = new_run(spec, tmp_path)
    train_run(spec, run)
    costs = json.loads((run.path / "manifest.json").read_text())["costs"]
    assert costs["updates"] == 40
    assert costs["examples_seen"] == 640
    assert costs["train_seconds"] > 0
    assert costs["measure_seconds"] > 0
    assert 4 <= costs["num_matvecs"] <= 100


def test_a_refusal_before_training_names_the_run_as_failed(tmp_path: Path) -> None:
    """Catches: a run that stays 'created' after an error."""
    spec = run_spec(data={"train": 5000})
    run = new_run(spec, tmp_path)
    events: list[ProgressEvent] = []
    with pytest.raises(UsageError, match="1797"):
        train_run(spec, run, progress=events.append)
    assert RunDirectory.open(run.path).manifest.status is RunStatus.FAILED
    assert "UsageError" in RunDirectory.open(run.path).manifest.reason
    assert events[-1].phase == "failed"
