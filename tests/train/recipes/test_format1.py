"""Sets that an older noisekit recorded in format 1: read as they are, never continued.

``recorded/format1`` was written by the last version with that format, from a recipe
with micro-batches, a ragged last batch, warm-up, milestones and every kind of snapshot.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from noisekit.cli.pipeline import write_report
from noisekit.core.errors import RecipeError, UsageError
from noisekit.records import open_runs
from noisekit.train.recipes.clock import Position
from noisekit.train.recipes.format1 import translated_run
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.revisit import revisit
from noisekit.train.sweeps import sweep
from noisekit.train.sweeps.run_status import recorded_recipe, status

RECORDED = Path(__file__).parents[1] / "recorded" / "format1"


def spec_of(run_id: str) -> RunSpec:
    manifest = json.loads((RECORDED / "runs" / run_id / "manifest.json").read_text())
    return RunSpec.from_table(manifest["recipe"])


def test_each_run_is_described_as_it_was_run() -> None:
    """The arm's own micro-batch, milestones and rate; the rest from the recipe.

    Catches: accumulation taken for the micro-batch's size; a base's micro-batch left
    to an arm with another batch size; a manifest and a recipe that are translated
    differently.
    """
    small, large = recorded_recipe(RECORDED).run_specs()
    assert small.training.model_dump(exclude_none=True) == {
        "batch_size": 8,
        "microbatch": 4,
        "epoch_end": "ragged",
        "loss": "cross_entropy",
        "stop": {"updates": 12, "loss": 1e-6},
        "label_smoothing": 0.0,
        "terms": (),
    }
    assert (large.training.batch_size, large.training.microbatch) == (16, 4)
    assert large.optimizer.learning_rate == 0.2
    for spec in (small, large):
        read = spec_of(spec.run_id)
        assert read.model_copy(update={"factors": spec.factors}) == spec


def test_rates_and_snapshots_are_those_of_the_tables() -> None:
    """What was recorded while training is what the translation gives.

    Catches: a warm-up from another factor or one update longer; milestones that are a
    share of something else; a snapshot at another update.
    """
    runs = open_runs(RECORDED)
    for run_id in ("small-seed0", "large-seed0"):
        spec = spec_of(run_id)
        factor = spec.schedule.factor(spec.clock)
        steps = runs.steps.query("run_id == @run_id")
        later = runs.snapshots.query("run_id == @run_id and step > 0")
        columns = ["step", "learning_rate"]
        rows = pd.concat([steps[columns], later[columns]])
        assert {1, 4, 7, 9, 10, 12} <= set(rows["step"])
        for _, row in rows.iterrows():
            place = Position(updates=int(row["step"]) - 1)
            rate = spec.optimizer.learning_rate * factor(place)
            assert rate == pytest.approx(row["learning_rate"], rel=1e-12)
        taken = runs.snapshots.query("run_id == @run_id").set_index("snapshot")["step"]
        for name in ("early", "later"):
            span = spec.clock.span(spec.snapshot_points[name])
            update = spec.clock.updates_to(span, spec.training.batch_size)
            assert update == taken[name]


def test_the_set_can_be_read_and_reported(tmp_path: Path) -> None:
    """Status, weights on their network, and the report.

    Catches: a version that can no longer open what last month's wrote.
    """
    path = tmp_path / "set"
    shutil.copytree(RECORDED, path)
    assert {row.status for row in status(path)} == {"done"}
    runs = open_runs(path)
    seen = revisit(runs, "large-seed0", "later")
    inputs, targets = seen.batches("test")[0]
    wrong = (seen.model(inputs).argmax(1) != targets).double().mean()
    row = runs.snapshots.query("run_id == 'large-seed0' and snapshot == 'later'")
    assert float(wrong) == row["test_error"].iloc[0]
    _, page, _ = write_report(path, None)
    assert "recorded_in_format_1" in page.read_text()


def test_a_complete_set_stays_and_an_incomplete_one_is_refused(tmp_path: Path) -> None:
    """Catches: half a run of one version and half of another, under one name."""
    path = tmp_path / "set"
    shutil.copytree(RECORDED, path)
    assert len(sweep.resume(path, workers=0)) == 2
    shutil.rmtree(path / "runs" / "large-seed0")
    with pytest.raises(UsageError, match="format 1, which is read but not continued"):
        sweep.resume(path, workers=0)
    assert not (path / "runs" / "large-seed0").exists()


def test_a_recipe_file_in_format_1_says_what_to_write(tmp_path: Path) -> None:
    """Catches: a list of unknown keys in place of what they are called now."""
    path = tmp_path / "recipe.toml"
    path.write_text('format = 1\nname = "old"\n')
    with pytest.raises(RecipeError, match=r"Set format = 2, and write: training\.mic"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("optimizer", {"name": "sgd", "betas": [0.9, 0.99]}, {"name": "sgd"}),
        ("optimizer", {"name": "adam", "nesterov": False}, {"name": "adam"}),
        ("model", {"name": "f1", "hidden": None, "norm": None}, {"name": "f1"}),
        ("data", {"name": "digits", "noise": None}, {"name": "digits"}),
        ("schedule", {"name": "constant", "gamma": 0.1}, {"name": "constant"}),
        (
            "schedule",
            {"name": "cosine", "warmup_updates": 1, "milestones": []},
            {"name": "cosine"},
        ),
        (
            "evaluation",
            {"every_updates": None, "every_epochs": 2.0},
            {"every": {"epochs": 2.0}},
        ),
    ],
)
def test_keys_of_other_kinds_are_left_out(section: str, old: dict, new: dict) -> None:
    """A recording in format 1 has the keys of every kind of a section.

    Catches: a recorded set that is refused for a key that it never stated.
    """
    assert translated_run({"format": 1, section: old})[section] == new
