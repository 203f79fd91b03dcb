"""A run that is killed and resumed ends in the same bits as one that was not."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import JsonValue

from noisekit.records import TABLES, RunDirectory, RunStatus
from noisekit.train.recipes.run_spec import RunSpec
from tests.train.run_specs import run_spec

SECTIONS: dict[str, dict[str, JsonValue]] = {
    "momentum": {
        "optimizer": {"name": "sgd", "momentum": 0.9, "learning_rate": 0.05},
        "schedule": {
            "name": "cosine",
            "warmup": {"length": {"updates": 4}, "start": 0.2},
        },
        "training": {"batch_size": 32, "stop": {"updates": 45, "loss": 1e-4}},
        "evaluation": {"every": {"updates": 5}},
        "snapshots": {
            "losses": [1.5, 0.3],
            "sustain": 3,
            "at": {"early": {"epochs": 2.0}},
        },
        "probe": {"every": 3, "estimator": ["auto", "rows", "random_signs"]},
        "measure": {
            "everywhere": ["lambda_max"],
            "at": {"final": ["hessian_trace", "epsilon_sharpness"]},
            "settings": {
                "epsilon_sharpness": [{"epsilon": 1e-3}],
                "hessian_trace": {"num_matvecs": 6},
            },
            "examples": ["test"],
        },
        "compute": {"checkpoint_updates": 10},
    },
    "adam with BatchNorm": {
        "model": {"name": "mlp", "hidden": [12], "norm": "batch"},
        "optimizer": {"name": "adam", "learning_rate": 0.01},
        "training": {
            "batch_size": 48,
            "microbatch": 24,
            "epoch_end": "ragged",
            "stop": {
                "epochs": 12.0,
                "stalled": {"patience_epochs": 3.0, "min_relative_decrease": 0.2},
            },
        },
        "evaluation": {"every": {"epochs": 1.0}},
        "snapshots": {
            "losses": [1.0],
            "sustain": 2,
            "at": {
                "stalled": {
                    "stalled": {"patience_epochs": 1.0, "min_relative_decrease": 0.5}
                }
            },
        },
        "probe": {"every": 3, "estimator": ["accumulation", "ghost"], "ghost_batch": 8},
        "measure": {"everywhere": ["grad_norm"], "examples": []},
        "compute": {"checkpoint_updates": 7},
    },
    "batches that change": {
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
        "training": {"epoch_end": "run_on", "stop": {"updates": 60}},
        "evaluation": {"every": {"updates": 4}, "splits": ["train", "test"]},
        "batch_policy": {"name": "cabs", "min": 3, "max": 60, "c": 10.0},
        "phases": [
            {
                "at": {"loss": 1.9},
                "set": {
                    "training.batch_size": 24,
                    "batch_policy": {
                        "name": "kicks",
                        "small": 5,
                        "length": {"updates": 4},
                        "cooldown": {"updates": 3},
                        "every": {"updates": 2},
                        "criterion": {"name": "progress", "window": 2, "below": 900.0},
                    },
                },
            },
            {"at": {"updates": 45}, "set": {"optimizer.momentum": 0.5}},
        ],
        "series": [{"every": {"updates": 9}, "measures": ["grad_norm"]}],
        "probe": {"every": 3},
        "measure": {"everywhere": ["grad_norm"], "examples": ["test"]},
        "compute": {"checkpoint_updates": 7},
    },
}


def tables_of(path: Path) -> dict[str, pa.Table]:
    """Every table without the columns that tell the time."""
    run = RunDirectory.open(path)
    return {
        name: run.read(name).rows.drop_columns(list(table.timing_columns))
        for name, table in TABLES.items()
    }


def assert_same_run(path: Path, reference: Path) -> None:
    run, whole = RunDirectory.open(path), RunDirectory.open(reference)
    assert run.manifest.status is RunStatus.DONE
    assert run.manifest.reason == whole.manifest.reason
    assert run.manifest.faults == ()
    wanted = tables_of(reference)
    for name, rows in tables_of(path).items():
        # Bytes, since NaN is not equal to itself.
        assert ipc_bytes(rows) == ipc_bytes(wanted[name]), f"{path.name}: {name}"
    snapshots = sorted(item.name for item in whole.snapshots.iterdir())
    assert sorted(item.name for item in run.snapshots.iterdir()) == snapshots
    for name in snapshots:
        found = (run.snapshots / name).read_bytes()
        assert found == (whole.snapshots / name).read_bytes(), f"{path.name}: {name}"
    assert not list(run.checkpoints.glob("*"))
    assert not list((path / "segments").glob("*"))


def ipc_bytes(rows: pa.Table) -> bytes:
    whole = rows.replace_schema_metadata(None).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def kill_everywhere(spec: RunSpec, folder: Path, *, random: int = 1) -> list[str]:
    """Kill runs at all kinds of moments, some at random; return the moments."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.resume.killing", str(folder), str(random)],
        input=spec.to_json(),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    moments: list[str] = json.loads(done.stdout)
    return moments


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_a_run_killed_anywhere_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    """Killed at each kind of moment, and at random times until it gets through.

    Catches: rows written twice or lost, since they were not durable before their
    checkpoint; random streams, the probe's among them, that go on from where the
    process stood or start anew; a momentum or Adam's count that starts anew; crossings
    forgotten; measures repeated; a table sealed twice; a run that starts anew after its
    checkpoints were removed; a batch policy without its state or its last reading; a
    phase that begins again; rows of a series written twice.
    """
    moments = kill_everywhere(run_spec(**SECTIONS[name]), tmp_path)
    told = " ".join(moments)
    for moment in ("rows are durable", "checkpoint saved", "examples are", "sealed"):
        assert moment in told
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == len(moments) + 1
    for path in killed:
        assert_same_run(path, tmp_path / "unbroken")
