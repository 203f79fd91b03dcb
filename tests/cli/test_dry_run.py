"""What ``--dry-run --timeline`` prints and draws, and that it runs nothing."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.timeline import curve, most_examples, updates_by_batch
from noisekit.train.sweeps import sweep
from noisekit.train.sweeps.cost import estimate_cost
from tests.cli.test_main import Call, call  # noqa: F401  the fixture

TINY = tomllib.loads((Path(__file__).parents[1] / "train/tiny.toml").read_text())
GROWING = {
    "name": "growing",
    "set": {
        "batch_policy": {
            "name": "growth",
            "factor": 2.0,
            "at": [{"epochs": 1.0}],
            "max": 16,
        }
    },
}


def contrast(**changes: Any) -> dict[str, Any]:
    return {
        "name": "error",
        "quantity": "test_loss",
        "treatment": "growing",
        "reference": "slow",
        "snapshot": "final",
        "scale": "difference",
        "margin": 0.001,
        "primary": True,
    } | changes


def recipe_file(folder: Path, **parts: Any) -> Path:
    table = {
        **TINY,
        "training": {"batch_size": 8, "stop": {"epochs": 3.0}},
        "arms": [{"name": "slow"}, {"name": "same"}, GROWING],
        **parts,
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def test_the_timeline_lists_every_change_and_draws_it(
    call: Call,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batch 8 of 32 examples doubles after 4 updates; two arms share a row's numbers.

    Catches: a change one update late; a figure that is drawn and not named; runs.
    """
    monkeypatch.chdir(tmp_path)
    path = recipe_file(tmp_path)
    code, out, _ = call("run", path, "--dry-run", "--timeline")
    assert code == 0
    assert "Nothing changes in these arms: batch 8, rate 0.1, momentum 0" in out
    assert "│ 12 │ 96 │ 3 │ slow │" in out
    assert "│ 12 │ 96 │ 3 │ same │" in out
    assert "growing: rate 0.1, momentum 0" in out
    assert "│ 0 │ 0 │ 0 │ 8 │ start │" in out
    assert "│ 4 │ 32 │ 1 │ 16 │ growth" in out
    assert "│ 8 │ 96 │ 3 │ 16 │ end of the longest run" in out
    folder = tmp_path / "noisekit-runs/tiny-/analyses/timeline"
    assert f"{folder.relative_to(tmp_path)}/timeline.png" in out
    assert (folder / "timeline.png").stat().st_size > 1000
    assert not (folder.parents[1] / "runs").exists()
    assert not (folder.parents[1] / "set.json").exists()
    code, _, _ = call("run", path, "--workers", "1", "--seeds", "1")
    assert code == 0


def test_what_changes_without_a_row_of_its_own_is_no_constant(
    call: Call,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A smooth schedule, a policy that follows readings, and a phase of another key.

    Catches: arms under "Nothing changes" whose rate falls, or whose batch is unknown.
    """
    adaptive = {"name": "cabs", "min": 4, "max": 16}
    later = {"at": {"epochs": 1}, "set": {"training.clip_norm": 1.0}}
    arms = [
        {"name": "constant"},
        {"name": "smooth", "set": {"schedule.name": "cosine"}},
        {
            "name": "follows",
            "set": {"batch_policy": adaptive, "training.epoch_end": "run_on"},
        },
        {"name": "clipped", "set": {"phases": [later]}},
    ]
    path = recipe_file(tmp_path, arms=arms)
    code, out, _ = call("run", path, "--dry-run", "--timeline", "--out", tmp_path)
    assert code == 0
    before, after = out.split("Nothing changes in these arms")
    for name in ("smooth", "follows", "clipped"):
        assert name in before
        assert name not in after
    assert "constant" in after
    assert "clip_norm = 1" in before


def test_power_is_unknown_without_a_spread(call: Call, tmp_path: Path) -> None:  # noqa: F811
    """Catches: a power that is made up."""
    path = recipe_file(tmp_path, contrasts=[contrast()])
    out_dir = tmp_path / "out"
    code, out, _ = call("run", path, "--dry-run", "--timeline", "--out", out_dir)
    assert code == 0
    assert "unknown: no spread is stated" in out
    assert "--spread-from DIR" in out


def test_power_comes_from_recorded_runs(call: Call, tmp_path: Path) -> None:  # noqa: F811
    """Half width from the recorded pairs, at the recipe's own number of seeds.

    A contrast that the recorded set does not have takes the spread of one of the same
    quantity, and says so.

    Catches: the number of recorded seeds in place of the planned one; a spread of
    single arms, which pairing cancels.
    """
    path = recipe_file(tmp_path, contrasts=[contrast()], seeds={"count": 3})
    runs = sweep.run(load_recipe(path), tmp_path / "set", workers=0)
    ends = runs.snapshots[runs.snapshots["snapshot"] == "final"]
    wide = ends.pivot(index="seed", columns="arm", values="test_loss")
    spread = float((wide["growing"] - wide["slow"]).std(ddof=1))
    assert spread > 0.001
    more = recipe_file(
        tmp_path,
        contrasts=[contrast(), contrast(name="other", treatment="same")],
        seeds={"count": 6},
    )
    arguments = ("--timeline", "--spread-from", tmp_path / "set", "--out", tmp_path)
    code, out, _ = call("run", more, "--dry-run", *arguments)
    assert code == 0
    width = 3.1634 * spread / 6**0.5  # t(5) at 1 - 0.05/2, two of two primary
    assert f"│ 6 │ {spread:.3g} │ {width:.3g} │ 0.001 │ wider than the margin" in out
    assert "(spread of 'error')" in out


def test_timeline_needs_a_dry_run(call: Call, tmp_path: Path) -> None:  # noqa: F811
    """Catches: an option that is taken and ignored, and a sweep in its place."""
    code, _, err = call("run", recipe_file(tmp_path), "--timeline")
    assert code == 2
    assert "need --dry-run" in err
    code, _, err = call(
        "run", recipe_file(tmp_path), "--dry-run", "--spread-from", tmp_path / "no"
    )
    assert code == 2
    assert "is no folder" in err


def test_more_seeds_than_planned_are_told(call: Call, tmp_path: Path) -> None:  # noqa: F811
    """On the terminal, in the record, and on the report's page.

    Catches: seeds that were added after a look, of which nothing tells.
    """
    path = recipe_file(tmp_path, contrasts=[contrast()])
    code, out, _ = call("run", path, "--seeds", "3", "--out", tmp_path / "set")
    assert code == 0
    assert "3 seeds, where the recipe plans 2" in out
    code, out, _ = call("run", path, "--out", tmp_path / "other")
    assert "recipe plans" not in out


def test_cost_counts_examples_of_changing_batches(tmp_path: Path) -> None:
    """An update of the grown batch counts as what it is.

    Catches: updates of the smallest batch times the first batch, which is no bound.
    """
    recipe = load_recipe(recipe_file(tmp_path, arms=[GROWING], seeds={"count": 1}))
    [spec] = recipe.run_specs()
    assert updates_by_batch(spec) == {8: 4, 16: 4}
    assert most_examples(spec) == 96
    cost = estimate_cost(recipe)
    assert (cost.updates, cost.gradient_evaluations) == (8, 96)


def test_a_curve_has_two_rows_where_a_setting_jumps(tmp_path: Path) -> None:
    """And one every so often where the rate changes continuously.

    Catches: a staircase for a cosine; a slope for a jump.
    """
    recipe = load_recipe(recipe_file(tmp_path, arms=[GROWING], seeds={"count": 1}))
    [spec] = recipe.run_specs()
    rows = [(row.update, row.batch_size) for row in curve(spec)]
    assert rows == [(0, 8), (4, 8), (4, 16), (8, 16)]
    smooth = {
        "name": "slow",
        "set": {"schedule": {"name": "cosine"}, "training.stop": {"epochs": 50.0}},
    }
    recipe = load_recipe(recipe_file(tmp_path, arms=[smooth], seeds={"count": 1}))
    [spec] = recipe.run_specs()
    found = [(row.update, row.learning_rate) for row in curve(spec, points=20)]
    assert found == sorted(found, key=lambda row: (row[0], -row[1]))
    assert 20 <= len(found) <= 42
    assert found[0] == (0, 0.1)
    assert found[-1][0] == 200
    assert found[-1][1] < 1e-4
