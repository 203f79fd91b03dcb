"""Gradient noise that a recipe asks for: what is recorded, and that it resumes."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import JsonValue
from torch.nn.functional import cross_entropy

from noisekit.core.batch_order import BatchOrder
from noisekit.core.randomness import stream
from noisekit.integrations import attach
from noisekit.noise.moments import GradientMoments
from noisekit.probes import Probe
from noisekit.records import RunDirectory, open_runs
from noisekit.train.data.datasets import load_data
from noisekit.train.models import build_model
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.loop import train_run
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.runs.snapshots import load_weights
from tests.train.run_specs import new_run, run_spec

NORMALISED: JsonValue = {"name": "mlp", "hidden": [16], "norm": "batch"}


def steps_of(spec: RunSpec, folder: Path) -> pd.DataFrame:
    run = new_run(spec, folder)
    train_run(spec, run)
    return open_runs(run.path).steps


def test_batch_norm_is_read_at_the_ghost_size(tmp_path: Path) -> None:
    """The first reading is that of four separate batches at the starting weights.

    Catches: a batch normalised as a whole; ghost batches of other examples than the
    update's; a loss whose targets the probe never saw, which leaves no reading.
    """
    spec = run_spec(
        model=NORMALISED,
        training={"batch_size": 128},
        probe={"every": 10, "estimator": "ghost", "ghost_batch": 32},
    )
    steps = steps_of(spec, tmp_path)
    assert list(steps["estimator"]) == ["ghost(32)"] * 4
    assert (steps["unit_size"] == 32).all()
    assert (steps["num_units"] == 4).all()
    assert (steps["status"] != "unavailable").all()
    moments = GradientMoments.from_columns(steps.iloc[0].to_dict())
    data = load_data(spec.data)
    model = build_model(
        spec.model,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        seed=spec.seed,
    )
    norms = []
    for rows in BatchOrder(0, num_examples=128, device="cpu").indices(0, 128).chunk(4):
        loss = cross_entropy(model(data.train.inputs[rows]), data.train.targets[rows])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(sum(float(grad.double().square().sum()) for grad in grads))
    assert float(moments.mean_sq_norm) == pytest.approx(sum(norms) / 4, rel=1e-4)


def test_replaying_ghost_batches_changes_no_bit(tmp_path: Path) -> None:
    """Catches: running statistics that the replays have moved."""
    plain = run_spec(model=NORMALISED)
    probe: JsonValue = {"every": 3, "estimator": "ghost", "ghost_batch": 8}
    ghost = run_spec(model=NORMALISED, probe=probe, run_id="ghost")
    found = []
    for spec in (plain, ghost):
        run = new_run(spec, tmp_path)
        train_run(spec, run)
        found.append(load_weights(run, "final"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rows_and_signs_are_drawn_from_the_run_s_own_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches: one generator for all seeds; the global one, which moves training."""
    seeds = []

    def watched(*args: Any, generator: torch.Generator, **options: Any) -> Probe:
        seeds.append(generator.initial_seed())
        return attach(*args, generator=generator, **options)

    monkeypatch.setattr("noisekit.train.runs.probing.attach", watched)
    for seed in (0, 1):
        spec = run_spec(probe={"every": 20}, seed=seed, run_id=f"seed{seed}")
        train_run(spec, new_run(spec, tmp_path))
    assert seeds == [stream(seed, "probe").initial_seed() for seed in (0, 1)]


def test_estimators_stand_side_by_side(tmp_path: Path) -> None:
    """Each has its statistics in every row, from which its noise scale follows.

    Catches: options that never reach the probe, or reach it as another.
    """
    names: JsonValue = ["per_example", "rows", "chunks", "random_signs", "ghost"]
    probe: JsonValue = {
        "every": 8,
        "estimator": names,
        "row_share": 0.5,
        "num_chunks": 8,
        "num_signs": 2,
        "ghost_batch": 4,
    }
    steps = steps_of(run_spec(probe=probe), tmp_path)
    assert set(steps["estimator"]) == {"per_example"}
    assert (steps["rows_num_read"] == 8).all()
    assert (steps["chunks_num_units"] == 8).all()
    assert (steps["ghost_unit_size"] == 4).all()
    for _, row in steps.iterrows():
        own = GradientMoments.from_columns(row.to_dict()).parts()
        ghost = GradientMoments.from_columns(row.to_dict(), "ghost_").parts()
        chunks = GradientMoments.from_columns(row.to_dict(), "chunks_").parts()
        assert own is not None
        assert ghost is not None
        assert chunks is not None
        assert ghost.variance_trace == pytest.approx(own.variance_trace, rel=1.5)
        assert chunks.variance_trace == pytest.approx(own.variance_trace, rel=1.5)


def test_step_metrics_are_recorded(tmp_path: Path) -> None:
    """By hand from the row itself: ``rate tr S (B - 1) / B`` over the batch's loss.

    Catches: metrics that never reach the probe, or that do not see the loss.
    """
    probe: JsonValue = {"every": 10, "quantities": ["cabs", "gsnr"]}
    steps = steps_of(run_spec(probe=probe), tmp_path)
    assert steps["gsnr"].notna().all()
    wanted = 0.1 * steps["variance_trace"] * 15 / 16 / steps["batch_loss"]
    pd.testing.assert_series_equal(steps["cabs"], wanted, rtol=1e-5, check_names=False)


@pytest.mark.parametrize(
    ("model", "probe"),
    [
        (NORMALISED, {"every": 3, "estimator": "ghost", "ghost_batch": 4}),
        ({}, {"every": 3, "estimator": ["rows", "random_signs"]}),
    ],
    ids=["ghost", "drawn"],
)
def test_a_resumed_run_has_the_same_readings(
    model: JsonValue, probe: JsonValue, tmp_path: Path
) -> None:
    """Stopped in the middle and resumed, bit for bit.

    Catches: a generator that starts anew, so that other rows and signs are drawn.
    """
    spec = run_spec(model=model, probe=probe, compute={"checkpoint_updates": 10})
    whole = steps_of(spec, tmp_path / "whole")
    run = new_run(spec, tmp_path)

    class StopError(Exception):
        """Stands for any error in the middle of a run."""

    def stop(event: ProgressEvent) -> None:
        if event.done == 20 and event.detail == "checkpoint saved":
            raise StopError

    with pytest.raises(StopError):
        train_run(spec, run, progress=stop)
    train_run(spec, RunDirectory.open(run.path))
    pd.testing.assert_frame_equal(open_runs(run.path).steps, whole)
