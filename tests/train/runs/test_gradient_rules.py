"""Whole runs with rules, augmentation and dropout: resumed, probed, and by hand."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from pydantic import JsonValue
from torch import nn

from noisekit.records import TABLES, RunDirectory, open_runs
from noisekit.train.data.datasets import load_data
from noisekit.train.models import build_model
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.loop import train_run
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.runs.snapshots import load_weights
from tests.train.run_specs import new_run, run_spec

Sections = dict[str, JsonValue]

PENALTY: JsonValue = {"kind": "gradient_penalty", "weight": 0.1}
ADVERSARIAL: JsonValue = {"kind": "adversarial", "epsilon": 0.05}
PROXIMAL: JsonValue = {"kind": "proximal", "weight": 0.01}
# ``hidden`` is taken away, which the toy's network has.
IMAGES: JsonValue = {"hidden": None, "name": "small_cnn", "width": 2, "norm": "batch"}
GPT: JsonValue = {
    "hidden": None,
    "name": "gpt",
    "layers": 1,
    "width": 8,
    "dropout": 0.2,
}
TEXT: JsonValue = {"name": "text", "context": 8}
AUGMENT: JsonValue = {"rotate_degrees": 10.0, "shift": 0.1, "crop_padding": 1}


class _Killed(BaseException):
    """Stands for the end of the process."""


def final_weights(run: RunDirectory) -> torch.Tensor:
    found = load_weights(run, "final")
    return torch.cat([tensor.reshape(-1).double() for tensor in found.values()])


def finished(spec: RunSpec, folder: Path) -> RunDirectory:
    run = new_run(spec, folder)
    train_run(spec, run)
    return run


def steps_of(run: RunDirectory) -> pd.DataFrame:
    return open_runs(run.path).steps


RESUMED: dict[str, Sections] = {
    "augmented": {
        "model": IMAGES,
        "augment": AUGMENT,
        "training": {"batch_size": 24, "epoch_end": "run_on", "microbatch": 10},
    },
    "dropout on tokens": {
        "data": TEXT,
        "model": GPT,
        "optimizer": {"name": "adam", "learning_rate": 0.01},
        "training": {"microbatch": 8},
    },
    "terms with BatchNorm": {
        "model": IMAGES,
        "augment": {"flip": True},
        "optimizer": {"momentum": 0.9, "learning_rate": 0.02},
        "training": {
            "terms": [PENALTY, ADVERSARIAL, PROXIMAL],
            "clip_norm": 1.0,
            "loss": "squared_error",
        },
        "probe": {"every": 3, "estimator": "ghost", "ghost_batch": 8},
    },
    "trust ratio in a phase": {
        "data": {"label_noise": 0.2},
        "optimizer": {"momentum": 0.9, "weight_decay": 1e-3},
        "training": {"label_smoothing": 0.1},
        "phases": [
            {"at": {"updates": 15}, "set": {"optimizer.trust_ratio": 0.02}},
            {"at": {"updates": 25}, "set": {"augment": {"shift": 0.2}}},
        ],
        "probe": {"every": 4},
    },
}


@pytest.mark.parametrize("sections", RESUMED.values(), ids=RESUMED)
def test_a_run_that_was_broken_off_ends_in_the_same_bits(
    sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three kills, with the global generator moved in between.

    Catches: masks or pictures that are drawn from a generator whose state is lost; an
    inner step that the checkpoint does not know; rules of the first phase after a
    resume in the second.
    """
    spec = run_spec(**{**sections, "compute": {"checkpoint_updates": 7}})
    whole = finished(spec, tmp_path / "whole")
    broken = new_run(spec, tmp_path / "broken")
    for saved in (1, 2, 2):
        left = saved

        def kill(event: ProgressEvent) -> None:
            nonlocal left
            if event.detail == "checkpoint saved":
                left -= 1
            if left == 0:
                raise _Killed

        with pytest.raises(_Killed):
            train_run(spec, broken, progress=kill)
        torch.manual_seed(saved)
        torch.rand(7)
    train_run(spec, broken)
    assert torch.equal(final_weights(broken), final_weights(whole))
    for name, table in TABLES.items():
        rows = [
            run.read(name).rows.drop_columns(list(table.timing_columns)).to_pandas()
            for run in (broken, whole)
        ]
        pd.testing.assert_frame_equal(*rows, check_exact=True)


def test_the_loop_draws_nothing_from_the_global_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other states of it at the start give the same bits, with all that draws.

    Catches: a layer that is not seeded; shuffling by the global generator.
    """
    spec = run_spec(data=TEXT, model=GPT)
    first = final_weights(finished(spec, tmp_path / "first"))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.default_generator)
    torch.default_generator.manual_seed(77)
    assert torch.equal(final_weights(finished(spec, tmp_path / "again")), first)
    plain = run_spec(data=TEXT, model={**GPT, "dropout": 0.0})
    assert not torch.equal(final_weights(finished(plain, tmp_path / "plain")), first)


class Noisy(nn.Module):
    """A network of the user's own that draws by a function, without a layer for it."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Drop half of the inputs in training."""
        kept = nn.functional.dropout(inputs.flatten(1), training=self.training)
        return self.layer(kept)


def test_a_users_own_network_is_seeded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: seeding where a dropout layer was found only."""
    monkeypatch.setattr("noisekit.train.models.build.resolve", lambda name: Noisy)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.default_generator)
    spec = run_spec(model={"name": "mine:Noisy", "hidden": None})
    found = []
    for seed in (1, 2):
        torch.default_generator.manual_seed(seed)
        found.append(final_weights(finished(spec, tmp_path / str(seed))))
    assert torch.equal(*found)


def test_every_update_and_micro_batch_has_draws_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice 40 masks, all different, and the same ones in another run of the seed.

    Catches: a stream of the seed alone, which drops the same units in each update.
    """
    masks: list[tuple[float, ...]] = []

    class Watched(Noisy):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.training:
                state = torch.get_rng_state()
                masks.append(tuple(torch.rand(8).tolist()))
                torch.set_rng_state(state)
            return super().forward(inputs)

    monkeypatch.setattr("noisekit.train.models.build.resolve", lambda name: Watched)
    spec = run_spec(
        model={"name": "mine:Watched", "hidden": None}, training={"microbatch": 8}
    )
    finished(spec, tmp_path / "first")
    first = masks.copy()
    assert len(first) == len(set(first)) == 80
    masks.clear()
    finished(spec, tmp_path / "again")
    assert masks == first


@pytest.mark.parametrize(
    "training",
    [
        {"clip_norm": 0.1},
        {"terms": [PENALTY]},
        {"terms": [ADVERSARIAL]},
        {"terms": [PROXIMAL]},
        {"terms": [PENALTY, ADVERSARIAL, PROXIMAL], "clip_norm": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("microbatch", [None, 4])
def test_a_probe_reads_the_plain_gradient(
    training: Sections, microbatch: int | None, tmp_path: Path
) -> None:
    """The first reading is the same with rules and without, one per update.

    Catches: passes beside the update that count as micro-batches; an inner step that
    makes a reading of its own; noise of penalized gradients.
    """
    keys: Sections = {"microbatch": microbatch}
    plain = run_spec(training=keys, probe={"every": 1})
    ruled = run_spec(training={**keys, **training}, probe={"every": 1})
    before, after = (
        steps_of(finished(spec, tmp_path / name))
        for spec, name in ((plain, "plain"), (ruled, "ruled"))
    )
    assert len(before) == len(after) == 40
    assert list(after["step"]) == list(range(1, 41))
    assert (after["status"] != "unavailable").all()
    same = ["grad_sq_norm", "mean_sq_norm", "batch_size", "batch_loss", "num_units"]
    pd.testing.assert_series_equal(before.iloc[0][same], after.iloc[0][same], rtol=1e-6)
    assert not before.iloc[-1][same].equals(after.iloc[-1][same])
    assert (before["clip_factor"] == 1.0).all()
    applied = after.iloc[0]["grad_sq_norm"] ** 0.5 * after.iloc[0]["clip_factor"]
    if "clip_norm" in training:
        assert applied == pytest.approx(0.1, rel=1e-4)
    else:
        assert applied != pytest.approx(after.iloc[0]["grad_sq_norm"] ** 0.5, rel=1e-6)


def test_a_probe_changes_no_bit_of_a_run_with_rules(tmp_path: Path) -> None:
    """Catches: hooks that run in the passes beside the update."""
    training: Sections = {"terms": [PENALTY, ADVERSARIAL, PROXIMAL], "clip_norm": 0.5}
    found = [
        final_weights(
            finished(
                run_spec(training=training, probe={"every": every}),
                tmp_path / str(every),
            )
        )
        for every in (0, 1)
    ]
    assert torch.equal(*found)


def test_a_sequence_is_an_example_and_its_error_a_share(tmp_path: Path) -> None:
    """Loss and error over positions, in evaluations and in outcomes.

    Catches: a loss summed over positions; the error of whole sequences beside that of
    characters.
    """
    spec = run_spec(
        data=TEXT,
        model={**GPT, "dropout": 0.0},
        optimizer={"name": "adam", "learning_rate": 0.01},
        measure={"examples": ["test"], "everywhere": ["grad_norm"]},
        probe={"every": 8},
    )
    run = finished(spec, tmp_path)
    runs = open_runs(run.path)
    data = load_data(spec.data)
    model = build_model(
        spec.model, input_shape=(8,), num_classes=96, seed=spec.seed
    ).eval()
    model.load_state_dict(load_weights(run, "final"))
    with torch.no_grad():
        logits = model(data.test.inputs)
    loss = nn.functional.cross_entropy(logits, data.test.targets)
    wrong = (logits.argmax(1) != data.test.targets).double()
    final = runs.snapshots.set_index("snapshot").loc["final"]
    assert final["test_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert final["test_error"] == pytest.approx(float(wrong.mean()), rel=1e-6)
    rows = runs.measurements.query("snapshot == 'final'").set_index("quantity")
    assert rows.loc["test_error", "value"] == pytest.approx(float(wrong.mean()))
    spread = wrong.mean(1).std(correction=0) / 64**0.5
    assert rows.loc["test_error", "stderr"] == pytest.approx(float(spread))
    steps = runs.steps
    assert (steps["batch_size"] == 16).all()
    assert (steps["status"] != "unavailable").all()


RUNS: dict[str, Sections] = {
    "gpt": {"data": TEXT, "model": GPT},
    "resnet": {
        "model": {"hidden": None, "name": "resnet", "depth": 8, "norm": "group"}
    },
    "alexnet": {"model": {"hidden": None, "name": "alexnet", "norm": "batch"}},
    "c1 on mnist-5k": {
        "data": {"name": "mnist-5k", "pool": 4},
        "model": {"hidden": None, "name": "c1"},
    },
    "blobs": {
        "data": {"name": "blobs"},
        "model": {"name": "mlp", "hidden": [8], "activation": "tanh"},
        "training": {"loss": "binary_cross_entropy"},
    },
}


@pytest.mark.parametrize("sections", RUNS.values(), ids=RUNS)
def test_new_networks_and_data_train_and_are_measured(
    sections: Sections, tmp_path: Path
) -> None:
    """The loss falls, the probe reads, and the curvature can be had.

    Catches: a network whose second derivatives do not exist; tokens that are cast to
    real numbers on their way to the device.
    """
    training = sections.get("training", {})
    spec = run_spec(
        **{
            **sections,
            "optimizer": {"name": "adam", "learning_rate": 0.005},
            "training": {**training, "stop": {"updates": 24}},
            "measure": {"at": {"final": ["lambda_max"]}, "num_examples": 16},
        }
    )
    runs = open_runs(finished(spec, tmp_path).path)
    losses = runs.snapshots.set_index("snapshot")["train_loss"]
    assert losses["final"] < losses["start"]
    found = runs.measurements.query("quantity == 'lambda_max'")
    assert len(found) == 1
    assert found["value"].iloc[0] > 0
