"""Small runs for tests: seconds at most, every key that a test needs within reach."""

import json
from pathlib import Path

from pydantic import JsonValue

from noisekit.records import Manifest, RunDirectory
from noisekit.train.recipes.run_spec import RunSpec

_BASE: dict[str, JsonValue] = {
    "recipe": "toy",
    "run_id": "toy-seed0",
    "arm": "toy",
    "seed": 0,
    "factors": {"batch_size": 16},
    "data": {"name": "digits", "train": 128, "validation": 64, "test": 64},
    "model": {"name": "mlp", "hidden": [16]},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "training": {"batch_size": 16, "stop": {"updates": 40}},
    "evaluation": {"every": {"updates": 8}},
    "probe": {"every": 0},
    "measure": {"examples": []},
}


def run_spec(**sections: JsonValue) -> RunSpec:
    """Return the toy run with ``sections`` on top, merged one level deep.

    A value of ``None`` takes a key away.
    """
    merged = dict(_BASE)
    for name, value in sections.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            both = {**before, **value}
            merged[name] = {k: v for k, v in both.items() if v is not None}
        else:
            merged[name] = value
    return RunSpec.from_json(json.dumps(merged))


def new_run(spec: RunSpec, folder: Path) -> RunDirectory:
    """Return a new directory for the run, inside ``folder``."""
    manifest = Manifest(run_id=spec.run_id, arm=spec.arm, seed=spec.seed)
    return RunDirectory.create(folder / spec.run_id, manifest)
