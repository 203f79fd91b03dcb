"""Batch size, rate and settings that change within a run: what the loop makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import JsonValue
from torch import nn
from torch.nn.functional import cross_entropy

from noisekit.core.randomness import stream
from noisekit.records import RunDirectory, Runs, open_runs
from noisekit.train.data.datasets import load_data
from noisekit.train.data.section import TensorPair
from noisekit.train.models import build_model
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.update_plan import UpdatePlan
from noisekit.train.runs.loop import train_run
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.runs.snapshots import load_weights
from noisekit.train.runs.state import TrainState, capture, restore
from noisekit.train.runs.updates import Updates
from tests.train.run_specs import new_run, run_spec

DOUBLES = {"name": "growth", "factor": 2, "every": {"updates": 3}, "max": 64}


def run_of(spec: RunSpec, folder: Path) -> Runs:
    run = new_run(spec, folder)
    train_run(spec, run)
    return open_runs(run.path)


def weights_at(runs: Runs, snapshot: str = "final") -> torch.Tensor:
    found = load_weights(runs.directories[0], snapshot)
    return torch.cat([tensor.reshape(-1).double() for tensor in found.values()])


def start_of(spec: RunSpec) -> nn.Module:
    data = load_data(spec.data)
    return build_model(
        spec.model, input_shape=data.input_shape, num_classes=10, seed=spec.seed
    ).double()


def stretch_of(spec: RunSpec, begin: int, count: int) -> torch.Tensor:
    """Examples of a stretch of the permutations, written down in full."""
    passes = 2 + (begin + count) // 128
    whole = torch.cat(
        [
            torch.randperm(128, generator=stream(spec.seed, "order", epoch))
            for epoch in range(passes)
        ]
    )
    return whole[begin : begin + count]


def trained_by_hand(
    spec: RunSpec, updates: list[tuple[int, float, float]]
) -> torch.Tensor:
    """Heavy-ball steps of stated batch size, rate and momentum, from one stretch on."""
    model, train = start_of(spec), load_data(spec.data).train
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    begin = 0
    for size, rate, momentum in updates:
        rows = stretch_of(spec, begin, size)
        begin += size
        outputs = model(train.inputs[rows].double())
        loss = cross_entropy(outputs, train.targets[rows])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g, v in zip(parameters, gradients, velocity, strict=True):
                v.mul_(momentum).add_(g)
                p.sub_(rate * v)
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def changing(**sections: Any) -> RunSpec:
    training = {
        "epoch_end": "run_on",
        "stop": {"updates": 10},
        **sections.pop("training", {}),
    }
    compute = {"dtype": "float64", **sections.pop("compute", {})}
    return run_spec(training=training, compute=compute, **sections)


@pytest.mark.parametrize("microbatch", [None, 12])
def test_a_growing_batch_is_plain_gradient_descent(
    microbatch: int | None, tmp_path: Path
) -> None:
    """Batches of 16, 32, 64, the rate as their root, in parts of 12 and what is left.

    Catches: an update of the old size after the change; a stretch that starts anew at
    the change; parts weighted alike though the last is smaller; the rate scaled by the
    size of the part or of the start.
    """
    spec = changing(
        optimizer={"momentum": 0.9, "reference_batch": 16, "scaling": "sqrt"},
        batch_policy=DOUBLES,
        training={"microbatch": microbatch},
    )
    runs = run_of(spec, tmp_path)
    sizes = [16] * 3 + [32] * 3 + [64] * 4
    steps = [(size, 0.1 * math.sqrt(size / 16), 0.9) for size in sizes]
    wanted = trained_by_hand(spec, steps)
    torch.testing.assert_close(weights_at(runs), wanted, rtol=1e-10, atol=1e-12)
    final = runs.snapshots.set_index("snapshot").loc["final"]
    assert final["examples_seen"] == sum(sizes)
    assert final["batch_size"] == 64
    assert final["learning_rate"] == pytest.approx(0.2)


def test_a_phase_keeps_the_optimizer_s_buffers(tmp_path: Path) -> None:
    """Catches: a velocity that starts anew; a momentum that never reaches PyTorch."""
    spec = changing(
        optimizer={"momentum": 0.9},
        phases=[
            {"at": {"updates": 4}, "set": {"optimizer.momentum": 0.5}},
            {
                "at": {"updates": 7},
                "set": {"training.batch_size": 32, "optimizer.learning_rate": 0.05},
            },
        ],
    )
    runs = run_of(spec, tmp_path)
    steps = [(16, 0.1, 0.9)] * 4 + [(16, 0.1, 0.5)] * 3 + [(32, 0.05, 0.5)] * 3
    wanted = trained_by_hand(spec, steps)
    torch.testing.assert_close(weights_at(runs), wanted, rtol=1e-10, atol=1e-12)
    assert list(runs.snapshots["phase"]) == [0, 2]


def test_betas_keep_their_half_life_in_examples() -> None:
    """Catches: betas of one update in the next; a power of the wrong ratio."""
    spec = run_spec(
        optimizer={
            "name": "adam",
            "reference_batch": 32,
            "scale_betas": "second",
            "betas": [0.9, 0.99],
        },
        batch_policy=DOUBLES,
        training={"epoch_end": "run_on"},
    )
    plan, seen, state = UpdatePlan(spec), [], None
    position = TrainState.start(spec, nn.Linear(64, 10)).position
    state = plan.start()
    for _ in range(7):
        state, update = plan.next(state, position)
        seen.append(update.settings["betas"])
        position = update.after
    assert seen[0] == (0.9, 0.99**0.5)
    assert seen[3] == (0.9, 0.99)
    assert seen[6] == (0.9, 0.99**2)
    half_lives = [
        math.log(0.5) / math.log(b[1]) * size
        for b, size in zip((seen[0], seen[3], seen[6]), (16, 32, 64), strict=True)
    ]
    assert half_lives == pytest.approx([half_lives[0]] * 3)


@pytest.mark.parametrize(
    ("point", "first_of_phase"),
    [({"loss": 2.0}, 17), ({"loss": 2.0, "sustain": 2}, 25), ({"updates": 9}, 10)],
)
def test_a_phase_begins_with_the_update_after_its_point(
    point: JsonValue, first_of_phase: int, tmp_path: Path
) -> None:
    """The training loss is below 2 at the evaluations of update 16, 24, ...

    Catches: a phase an update or an evaluation early or late; one that never begins.
    """
    spec = run_spec(
        phases=[{"at": point, "set": {"training.batch_size": 32}}],
        training={"epoch_end": "run_on"},
        probe={"every": 1, "estimator": "per_example"},
    )
    runs = run_of(spec, tmp_path)
    losses = runs.evaluations.set_index("step")["train_loss"]
    assert losses[8] > 2.0 > losses[16]
    steps = runs.steps.set_index("step")["batch_size"]
    assert set(steps[: first_of_phase - 1]) == {16}
    assert set(steps[first_of_phase:]) == {32}


def test_a_later_phase_waits_for_the_one_before(tmp_path: Path) -> None:
    """Both losses are crossed at once; the second counts from the first's start on.

    Catches: phases that begin in the order of their losses; two at one evaluation.
    """
    spec = run_spec(
        phases=[
            {"at": {"loss": 2.0}, "set": {"training.batch_size": 32}},
            {"at": {"loss": 2.1}, "set": {"training.batch_size": 8}},
        ],
        training={"epoch_end": "run_on"},
        probe={"every": 1},
    )
    steps = run_of(spec, tmp_path).steps.set_index("step")["batch_size"]
    assert list(steps[[16, 17, 24, 25, 40]]) == [16, 32, 32, 8, 8]


class Forwards(nn.Module):
    """Records the size of each forward pass in training mode."""

    sizes: list[int]

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.sizes = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.sizes.append(len(inputs))
        outputs: torch.Tensor = self.inner(inputs)
        return outputs


def test_the_microbatch_stays_while_the_batch_grows() -> None:
    """What BatchNorm sees is 16 examples at every size of the batch.

    Catches: a microbatch that grows with the batch, so that batch size and
    normalisation are confounded.
    """
    spec = run_spec(
        training={"microbatch": 16, "epoch_end": "run_on"}, batch_policy=DOUBLES
    )
    data = load_data(spec.data)
    model = Forwards(
        build_model(spec.model, input_shape=data.input_shape, num_classes=10, seed=0)
    )
    state, plan = TrainState.start(spec, model), UpdatePlan(spec)
    updates = Updates(spec, data.train, cross_entropy)
    state.plan = plan.start()
    for _ in range(7):
        state.plan, planned = plan.next(state.plan, state.position)
        updates.gradient(state, planned)
        state.position = planned.after
    assert model.sizes == [16] * (3 * 1 + 3 * 2 + 4)


def cabs_by_hand(steps: pd.DataFrame, low: int, high: int) -> list[int]:
    """Ten times the official rule: averages from 0 and 1, half to even, clip."""
    variance, loss, sizes = 0.0, 1.0, [16]
    for row in steps.itertuples():
        biased = row.variance_trace * (row.batch_size - 1) / row.batch_size
        variance = 0.95 * variance + 0.05 * biased
        loss = 0.95 * loss + 0.05 * row.batch_loss
        sizes.append(
            min(max(round(10 * row.learning_rate * variance / loss), low), high)
        )
    return sizes[:-1]


def test_cabs_follows_its_readings(tmp_path: Path) -> None:
    """Every update's size is that of the rule on the rows of the updates before.

    Catches: the reading of the batch that is about to be chosen (look-ahead), or of the
    update before the last; readings every tenth update only; the loss of an evaluation.
    """
    spec = run_spec(
        optimizer={"learning_rate": 0.5},
        batch_policy={"name": "cabs", "min": 4, "max": 40, "c": 10.0},
        training={"epoch_end": "run_on", "stop": {"updates": 60}},
        probe={"every": 10},
    )
    steps = run_of(spec, tmp_path).steps
    assert len(steps) == 60
    assert len(set(steps["batch_size"])) > 10
    assert list(steps["batch_size"]) == cabs_by_hand(steps, 4, 40)


def test_cabs_may_read_convolutions_as_its_authors_do(tmp_path: Path) -> None:
    """The variance is the one that the metric ``cabs_conv_compat`` is made of.

    Catches: the exact variance under both names; a metric that is never read.
    """
    spec = run_spec(
        model={"name": "small_cnn", "width": 2, "hidden": None},
        optimizer={"learning_rate": 0.5},
        batch_policy={
            "name": "cabs",
            "min": 4,
            "max": 200,
            "c": 400.0,
            "moments": "conv_compat",
        },
        training={"epoch_end": "run_on", "stop": {"updates": 12}},
    )
    steps = run_of(spec, tmp_path).steps
    variance, loss, sizes = 0.0, 1.0, [16]
    for row in steps.itertuples():
        conv = row.cabs_conv_compat * row.batch_loss / row.learning_rate
        variance = 0.95 * variance + 0.05 * conv
        loss = 0.95 * loss + 0.05 * row.batch_loss
        sizes.append(min(max(round(400 * 0.5 * variance / loss), 4), 200))
    assert list(steps["batch_size"]) == sizes[:-1]
    assert len(set(sizes)) > 4


def test_kicks_make_the_batch_small_for_an_epoch(tmp_path: Path) -> None:
    """Catches: a kick whose loss is never seen; one in mid-epoch; no way back."""
    policy: JsonValue = {
        "name": "kicks",
        "small": 8,
        "cooldown": {"epochs": 2},
        "criterion": {"name": "relative_decrease", "window": 1, "below": 0.9},
    }
    spec = run_spec(
        batch_policy=policy,
        training={"batch_size": 64, "stop": {"epochs": 10}},
        probe={"every": 1},
    )
    steps = run_of(spec, tmp_path).steps
    sizes = [int(size) for size in steps["batch_size"]]
    normal, kick = [64] * 2, [8] * 16
    assert sizes[:4] == normal * 2
    assert sizes[4:20] == kick
    assert sizes[20:26] == normal * 3  # two epochs of cooldown, and one more loss
    assert sizes[26:42] == kick


def test_a_series_changes_no_bit(tmp_path: Path) -> None:
    """With BatchNorm, momentum, a probe and crossings, in float32.

    Catches: statistics moved by measuring; global random numbers drawn; a probe that
    takes measuring's passes for the step's; evaluation mode left on.
    """
    sections: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": [16], "norm": "batch"},
        "optimizer": {"momentum": 0.9},
        "snapshots": {"losses": [1.5], "at": {"early": {"epochs": 1}}},
        "probe": {"every": 3, "estimator": "ghost", "ghost_batch": 8},
        "measure": {"at": {"early": ["grad_norm", "lambda_max"]}, "examples": []},
    }
    measures = ["lambda_max", "average_sharpness", "grad_norm"]
    plain = run_of(run_spec(**sections), tmp_path)
    series = run_of(
        run_spec(
            run_id="series",
            series=[{"every": {"updates": 4}, "measures": measures}],
            **sections,
        ),
        tmp_path,
    )
    for snapshot in ("start", "early", "loss_1.5", "final"):
        before = load_weights(plain.directories[0], snapshot)
        after = load_weights(series.directories[0], snapshot)
        assert all(torch.equal(before[name], after[name]) for name in before)
    own = ["run_id", "coverage"]
    pd.testing.assert_frame_equal(
        plain.steps.drop(columns=own), series.steps.drop(columns=own)
    )
    rows = series.measurements[series.measurements["snapshot"].isna()]
    assert sorted(set(rows["step"])) == list(range(0, 41, 4))
    assert set(rows["measure"]) == set(measures)
    kept = series.measurements[series.measurements["snapshot"] == "early"]
    for name in ("grad_norm", "lambda_max"):
        along = rows[(rows["step"] == 8) & (rows["quantity"] == name)]["value"]
        there = kept[kept["quantity"] == name]["value"]
        assert float(along.iloc[0]) == pytest.approx(float(there.iloc[0]), rel=1e-4)


def test_a_series_of_what_examples_have_keeps_no_examples(tmp_path: Path) -> None:
    """Snapshots do. Catches: rows of examples counted that were never written."""
    name = "example_grad_sq_norm"
    spec = run_spec(
        training={"stop": {"updates": 8}},
        series=[{"every": {"updates": 4}, "measures": [name]}],
        measure={"everywhere": [name], "examples": ["test"]},
    )
    runs = run_of(spec, tmp_path)
    norms = runs.examples.dropna(subset=name)
    assert set(norms["snapshot"]) == {"start", "final"}
    assert len(norms) == 2 * 128
    assert runs.measurements["snapshot"].isna().sum() == 3


def test_splits_that_nobody_needs_are_not_evaluated(tmp_path: Path) -> None:
    """Snapshots have all parts. Catches: a snapshot without its test error."""
    spec = run_spec(
        evaluation={"splits": ["train"]}, snapshots={"losses": [1.9], "sustain": 2}
    )
    whole = run_of(
        run_spec(run_id="all", snapshots={"losses": [1.9], "sustain": 2}), tmp_path
    )
    some = run_of(spec, tmp_path)
    assert some.evaluations["test_loss"].isna().all()
    assert some.evaluations["train_loss"].notna().all()
    columns = ["snapshot", "step", "train_loss", "validation_error", "test_loss"]
    pd.testing.assert_frame_equal(some.snapshots[columns], whole.snapshots[columns])
    assert list(some.snapshots["snapshot"]) == ["start", "loss_1.9", "final"]


def test_intervals_of_snapshots_are_named_by_their_amount(tmp_path: Path) -> None:
    """Catches: names of update numbers; a last one that is left out."""
    every = {"epoch": {"epochs": 2}, "part": {"share": 0.5}}
    spec = run_spec(training={"stop": {"epochs": 5}}, snapshots={"every": every})
    rows = run_of(spec, tmp_path).snapshots.set_index("snapshot")["step"]
    assert dict(rows) == {
        "start": 0,
        "epoch_2": 16,
        "part_0.5": 20,
        "epoch_4": 32,
        "part_1": 40,
        "final": 40,
    }


class Mean(nn.Module):
    """A model whose gradient is the mean of its inputs, whatever its weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight


def update_variance(size: int, train: TensorPair, count: int) -> float:
    """Trace of the covariance of the updates at a rate per example of 0.1."""
    spec = run_spec(
        data={"train": len(train)},
        optimizer={"reference_batch": 1, "scaling": "linear"},
        training={"batch_size": size, "stop": {"updates": count}},
    )
    model = Mean(train.inputs.shape[1])
    state, plan = TrainState.start(spec, model), UpdatePlan(spec)
    updates = Updates(spec, train, lambda outputs, targets: outputs.mean())
    center, total = train.inputs.mean(0), 0.0
    state.plan = plan.start()
    for _ in range(count):
        state.plan, planned = plan.next(state.plan, state.position)
        updates.gradient(state, planned)
        before = model.weight.detach().clone()
        state.optimizer.step()
        state.position = planned.after
        deviation = model.weight.detach() - before + 0.1 * size * center
        total += float(deviation.square().sum())
    return total / count


def test_update_variance_is_linear_in_the_batch_at_a_fixed_rate_per_example() -> None:
    """``tr Cov = r² m tr S (1 - m / N)``, drawn without replacement from N = 4,096.

    The slope of its logarithm on that of ``m``, corrected for the finite population, is
    1 to 0.1 %; without the correction it is 0.979.

    Catches: a rate that is not per example; draws with replacement; means that are
    sums; a batch that is not the one asked for.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4096, 384, generator=generator, dtype=torch.float64)
    train = TensorPair(inputs, torch.zeros(4096, dtype=torch.int64))
    trace = float(inputs.var(0).sum())
    sizes = [2, 8, 32, 128, 512]
    found = [update_variance(size, train, 2048) for size in sizes]
    for size, value in zip(sizes, found, strict=True):
        wanted = 0.01 * size * trace * (1 - size / 4096)
        assert value == pytest.approx(wanted, rel=1e-2)
    logs = torch.tensor(sizes).double().log()
    corrected = torch.tensor(
        [v / (1 - m / 4096) for v, m in zip(found, sizes, strict=True)]
    ).double()
    plain = torch.tensor(found).double()
    assert slope(logs, corrected.log()) == pytest.approx(1.0, abs=1e-3)
    assert slope(logs, plain.log()) == pytest.approx(0.979, abs=2e-3)


def slope(x: torch.Tensor, y: torch.Tensor) -> float:
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


class StopError(Exception):
    """Stands for any error in the middle of a run."""


@pytest.mark.parametrize("name", ["cabs", "growth", "kicks", "phases"])
def test_a_resumed_run_takes_the_same_updates(name: str, tmp_path: Path) -> None:
    """Stopped at a checkpoint in mid-epoch, in a kick, between phases, and resumed.

    Catches: a policy that starts anew, or without its last reading; a cursor of update
    times batch size; a phase that begins again; a rate of the wrong phase.
    """
    policies: dict[str, JsonValue] = {
        "cabs": {"name": "cabs", "min": 2, "max": 100, "c": 10.0},
        "growth": {**DOUBLES, "every": {"updates": 7}},
        "kicks": {
            "name": "kicks",
            "small": 3,
            "criterion": {"name": "progress", "window": 2, "below": 1000.0},
        },
        "phases": {},
    }
    phases: JsonValue = [
        {"at": {"loss": 2.1}, "set": {"optimizer.momentum": 0.8}},
        {"at": {"updates": 25}, "set": {"training.batch_size": 7}},
    ]
    spec = run_spec(
        optimizer={"learning_rate": 0.5},
        batch_policy=policies[name],
        phases=phases if name == "phases" else [],
        training={"epoch_end": "run_on", "stop": {"updates": 40}},
        probe={"every": 1},
        series=[{"every": {"updates": 6}, "measures": ["grad_norm"]}],
        compute={"checkpoint_updates": 5},
    )
    whole = run_of(spec, tmp_path / "whole")
    assert len(set(whole.steps["batch_size"])) > 1
    for stop_at in (5, 20, 30):
        run = new_run(spec, tmp_path / str(stop_at))

        def stop(event: ProgressEvent, at: int = stop_at) -> None:
            if event.done == at and event.detail == "checkpoint saved":
                raise StopError

        with pytest.raises(StopError):
            train_run(spec, run, progress=stop)
        train_run(spec, RunDirectory.open(run.path))
        found = open_runs(run.path)
        assert torch.equal(weights_at(found), weights_at(whole))
        pd.testing.assert_frame_equal(found.steps, whole.steps)
        pd.testing.assert_frame_equal(found.evaluations, whole.evaluations)
        pd.testing.assert_frame_equal(
            found.measurements.drop(columns="seconds"),
            whole.measurements.drop(columns="seconds"),
        )


def test_checkpoints_of_before_there_were_phases_are_read(tmp_path: Path) -> None:
    """Catches: a resume that asks for keys that an older checkpoint does not have."""
    spec = run_spec()
    data = load_data(spec.data)
    model = build_model(
        spec.model, input_shape=data.input_shape, num_classes=10, seed=0
    )
    state = TrainState.start(spec, model)
    captured = capture(state, None)
    for key in ("phase", "policy_state", "observed"):
        del captured.values[key]
    json.dumps(captured.values)
    restore(state, None, captured)
    assert state.plan.phase == 0
