"""The page of a loop of one's own: noise, coverage, and what it does not say."""

from pathlib import Path

import numpy as np
import pytest

from noisekit.records import Runs, RunSink, open_runs
from noisekit.report import build_report, own_loop_result, provenance_of
from tests.report.samples import read


class Row(dict):
    """A reading, as far as a table is concerned."""

    def row(self) -> dict:
        return dict(self)


def recorded(folder: Path, *, noisy: bool, name: str = "loop", num: int = 60) -> Runs:
    """Record a loop whose noise scale is 20, read with the noise of 32 examples."""
    source = np.random.default_rng(0)
    with RunSink(folder / name) as sink:
        for step in range(1, num + 1):
            row = {"step": step, "examples_seen": 32 * step, "batch_size": 32}
            row |= {"grad_sq_norm": 1.0, "unit": "example", "coverage": 0.0}
            row |= {"estimator": "none", "status": "unavailable"}
            if noisy:
                squared = 0.5 + source.normal(0, 0.4)
                row |= {"variance_trace": 10.0 + source.normal(0, 1.0)}
                row |= {"debiased_grad_sq_norm": squared, "coverage": 1.0}
                row |= {"estimator": "per_example", "status": "not_resolved"}
                row |= {"simple_noise_scale": row["variance_trace"] / squared}
            sink(Row(row))
    return open_runs(folder / name)


def result_of(runs: Runs):
    return own_loop_result(runs, name="gradient_noise", question="How noisy?")


def test_the_noise_scale_is_a_ratio_of_averages(tmp_path: Path) -> None:
    """Catches: the mean of single ratios, which is anything but 20."""
    runs = recorded(tmp_path, noisy=True)
    answer = result_of(runs).answer
    single = runs.steps["simple_noise_scale"].mean()
    parts = runs.steps[["variance_trace", "debiased_grad_sq_norm"]].mean()
    pooled = parts["variance_trace"] / parts["debiased_grad_sq_norm"]
    assert abs(single / pooled - 1) > 0.3
    assert f"is {pooled:.3g} examples (95 % interval " in answer
    assert "60 readings up to update 60" in answer


def test_loops_without_noise_are_not_said_to_have_it(tmp_path: Path) -> None:
    """Catches: "60 readings of gradient noise" of a network with BatchNorm."""
    result = result_of(recorded(tmp_path, noisy=False))
    assert "60 readings up to update 60, all without gradient noise" in result.answer
    assert "estimator='ghost'" in result.answer
    assert not result.plots
    [coverage] = result.tables
    assert coverage.frame["coverage"].tolist() == [0.0]


def test_windows_and_coverage_are_tabulated(tmp_path: Path) -> None:
    """Catches: a page of one sentence; a table without its caption."""
    result = result_of(recorded(tmp_path, noisy=True))
    tables = {table.name: table.frame for table in result.tables}
    assert set(tables) == {"noise_by_window", "coverage"}
    assert set(tables["noise_by_window"]["quantity"]) >= {"simple_noise_scale"}
    assert tables["coverage"]["readings"].tolist() == [60]
    assert all(table.caption.endswith(".") for table in result.tables)
    assert [plot.name for plot in result.plots] == ["noise_over_training"]


def test_two_loops_stand_side_by_side(tmp_path: Path) -> None:
    """Catches: readings of two loops pooled into one scale."""
    for name, noisy in (("first", True), ("second_one", False)):
        recorded(tmp_path, noisy=noisy, name=name)
    runs = open_runs([tmp_path / "first", tmp_path / "second_one"])
    first, second, _ = result_of(runs).answer.splitlines()
    assert first.startswith("first: 60 readings")
    assert second.startswith("second one: 60 readings")


@pytest.mark.parametrize("noisy", [True, False])
def test_the_page_of_a_loop_claims_nothing(tmp_path: Path, noisy: bool) -> None:
    """Catches: rules of a fair test, or verdicts, on a loop that named none."""
    runs = recorded(tmp_path, noisy=noisy)
    path = build_report([result_of(runs)], provenance_of(runs), tmp_path / "r.html")
    words = read(path).words
    assert "A recorded loop claims nothing; there is no verdict." in words
    assert "Rules of a fair test" not in words
    assert "wall time of the loop" in words
