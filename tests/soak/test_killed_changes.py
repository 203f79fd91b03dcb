"""Runs whose batch size changes, killed at many random moments: equal bits."""

from pathlib import Path

import pytest
from pydantic import JsonValue

from tests.resume.test_resume import SECTIONS, assert_same_run, kill_everywhere
from tests.train.run_specs import run_spec

POLICIES: dict[str, dict[str, JsonValue]] = {
    "all": {},
    "growth": {
        "batch_policy": {
            "name": "growth",
            "factor": 1.7,
            "every": {"updates": 13},
            "max": 90,
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 0.01,
            "reference_batch": 16,
            "scaling": "sqrt",
            "scale_betas": "both",
        },
        "phases": [{"at": {"epochs": 3.3}, "set": {"optimizer.weight_decay": 0.01}}],
    },
    "noise scale": {
        "batch_policy": {"name": "noise_scale", "max": 90, "min_readings": 3},
        "phases": [],
    },
}


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", POLICIES)
def test_runs_killed_at_random_end_in_the_same_bits(name: str, tmp_path: Path) -> None:
    """Some 50 kills of each. Catches: what only a rare moment of a kill shows."""
    spec = run_spec(**{**SECTIONS["batches that change"], **POLICIES[name]})
    kill_everywhere(spec, tmp_path, random=10)
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) > 10
    for path in killed:
        assert_same_run(path, tmp_path / "unbroken")
