"""Where the numbers come from: costs, commands, recipe and the runs themselves."""

import tomllib
from pathlib import Path

from noisekit.records import Manifest, RunDirectory, RunStatus, open_runs
from noisekit.report import build_report, provenance_of
from tests.report.samples import make_runs, read

RECIPE = {
    "name": "toy",
    "profile": "demo",
    "data": {"name": "digits", "path": None},
    "arms": [{"name": "small", "set": {"training.batch_size": 16}}, None],
}


def test_costs_are_summed_over_runs(tmp_path: Path) -> None:
    """Catches: the cost of one run; columns that these runs do not have."""
    runs = make_runs(tmp_path, recipe=RECIPE)
    assert provenance_of(runs, analysis_seconds=3.4).costs == {
        "runs": "4",
        "training, summed over runs": "6 s",
        "updates": "2,400",
        "Hessian-vector products": "100",
        "analysing and drawing": "3 s",
    }


def test_the_recipe_can_be_read_again(tmp_path: Path) -> None:
    """Catches: empty keys, which TOML has no word for; keys lost with them."""
    origin = provenance_of(make_runs(tmp_path, recipe=RECIPE))
    assert tomllib.loads(origin.recipe) == {
        "name": "toy",
        "profile": "demo",
        "data": {"name": "digits"},
        "arms": [{"name": "small", "set": {"training.batch_size": 16}}],
    }
    assert origin.title == "toy · demo"
    assert origin.commands == (
        "noisekit run toy --profile demo --out DIR",
        "noisekit report DIR",
    )
    assert origin.data == {"name": "toy data"}


def test_runs_stand_with_their_status_and_how_far_they_got(tmp_path: Path) -> None:
    """Catches: a diverged run that the page does not show."""
    status = {"large-seed1": RunStatus.DIVERGED}
    origin = provenance_of(make_runs(tmp_path, recipe=RECIPE, status=status))
    assert origin.runs is not None
    rows = origin.runs.frame.set_index("run_id")
    assert rows["status"].to_dict() == {
        "large-seed0": "done",
        "large-seed1": "diverged",
        "small-seed0": "done",
        "small-seed1": "done",
    }
    assert set(rows["step"]) == {600}
    page = read(build_report([], origin, tmp_path / "report.html"))
    assert "diverged" in page.words


def test_arms_are_called_as_in_the_figures(tmp_path: Path) -> None:
    """Catches: names of arms in tables that no legend has."""
    rates = {"small": (0.1,), "large": (0.2,)}
    assert provenance_of(make_runs(tmp_path, rates=rates)).arms == {
        "small": "batch 16, rate 0.1",
        "large": "batch 128, rate 0.2",
    }


def test_a_single_run_of_ones_own_loop_has_a_page(tmp_path: Path) -> None:
    """Catches: recipe, arms or evaluations taken for granted."""
    run = RunDirectory.create(
        tmp_path / "mine", Manifest(run_id="mine", arm="", seed=0)
    )
    with run.lock(), run.writer("steps") as writer:
        writer.append({"step": 7, "batch_loss": 1.0})
    origin = provenance_of(open_runs(tmp_path / "mine"))
    assert origin.title == "mine"
    assert origin.recipe == ""
    assert origin.commands == ("noisekit report DIR",)
    assert origin.runs is not None
    assert origin.runs.frame["step"].tolist() == [7]
    page = read(build_report([], origin, tmp_path / "report.html"))
    assert "claim nothing" in page.words
    assert "mine" in page.words
