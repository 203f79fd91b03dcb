"""The descriptive analysis: the paper's statistics, and no verdict."""

from pathlib import Path
from types import ModuleType

import pytest

import noisekit as nk
from noisekit import report
from tests.analyses.scripts import load_script


@pytest.fixture(scope="module")
def result(smoke_runs: Path) -> report.AnalysisResult:
    """Return the analysis of the smoke runs."""
    return load_script("outcomes_by_arm").analyse(nk.open_runs(smoke_runs))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the analysis as a module."""
    return load_script("outcomes_by_arm")


def test_paper_s_tables_and_figures_are_there(result: report.AnalysisResult) -> None:
    """Catches: a statistic of the paper that is missing, a table without a caption."""
    assert {plot.name for plot in result.plots} == {"linear_path", "training_curves"}
    assert {table.name for table in result.tables} == {
        "accuracy",
        "curve_gaps",
        "distance",
        "epsilon_sharpness",
        "keskar_2017",
    }
    assert all(item.caption for item in (*result.plots, *result.tables))


def test_nothing_is_judged(result: report.AnalysisResult) -> None:
    """Catches: a verdict outside of the contrasts that were fixed before."""
    assert not result.claims
    assert not result.rules


def test_accuracy_is_that_of_the_snapshots(
    result: report.AnalysisResult, smoke_runs: Path
) -> None:
    """Catches: an error printed as an accuracy, a fraction printed as percent."""
    (accuracy,) = (t.frame for t in result.tables if t.name == "accuracy")
    row = accuracy[
        (accuracy["snapshot"] == "equal_updates") & (accuracy["arm"] == "small_high")
    ].iloc[0]
    kept = nk.open_runs(smoke_runs).snapshots
    here = kept[(kept["snapshot"] == "equal_updates") & (kept["arm"] == "small_high")]
    wanted = 100 * (1 - here["test_error"].mean())
    printed = float(row["test accuracy [%]"].split(" ± ")[0])
    assert printed == pytest.approx(wanted, rel=1e-3)


def test_line_runs_from_small_to_large_batch(
    script: ModuleType, result: report.AnalysisResult, smoke_runs: Path
) -> None:
    """At alpha 0 and 1 the line has the losses of the two networks themselves.

    Catches: ends exchanged; another snapshot; test data taken for training data.
    """
    runs = nk.open_runs(smoke_runs)
    arms = report.extreme_arms(runs)
    assert arms == ("small_low", "large_low")
    (line,) = (plot.table for plot in result.plots if plot.name == "linear_path")
    kept = runs.snapshots[runs.snapshots["snapshot"] == "final"]
    for alpha, arm in zip((0.0, 1.0), arms, strict=True):
        for split in ("train", "test"):
            drawn = line[(line["alpha"] == alpha) & (line["split"] == split)]
            wanted = kept[kept["arm"] == arm].set_index("seed")[f"{split}_loss"]
            got = drawn.set_index("seed")["loss"]
            assert dict(got) == pytest.approx(dict(wanted), rel=1e-5)


def test_arms_that_differ_in_network_are_described(
    script: ModuleType, network_runs: Path
) -> None:
    """Catches: a KeyError where no batch size varies; a line between two networks."""
    result = script.analyse(nk.open_runs(network_runs))
    assert [plot.name for plot in result.plots] == ["training_curves"]
    assert "% (with batchnorm)" in result.answer
    assert "% (plain)" in result.answer


def test_paper_s_own_numbers_stand_beside_ours(script: ModuleType) -> None:
    """Catches: a digit lost from the paper's tables 2 to 4 for its network F1."""
    table = script.PAPER.set_index("statistic")
    assert table.loc["test accuracy [%]", "large batch"] == "97.81 ± 0.07"
    assert table.loc["full space, ε=0.001", "large batch"] == "205.14 ± 69.52"
    assert table.loc["100 dimensions, ε=0.0005", "small batch"] == "0.05 ± 0.00"
