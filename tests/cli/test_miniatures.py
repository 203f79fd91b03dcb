"""Experiments of forks and grids, in miniature, as a person runs them."""

from pathlib import Path

import pytest

import noisekit as nk
from noisekit.report.comparability import judged_claims
from tests.cli.test_main import Call, call  # noqa: F401  the fixture

FOLDER = Path(__file__).with_name("miniatures")
FACTORS = {
    "warm_start": {"snapshot", "start.arm", "batch_size"},
    "branch_and_compare": {"order", "batch_size", "learning_rate", "start.arm"},
    "base_learning_rate_grid": {"batch_size", "learning_rate"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORS)
def test_a_miniature_runs_from_file_to_claims(
    name: str,
    call: Call,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Every run is complete, factors are columns, and each claim has its number.

    Catches: arms of a grid whose names no directory, table or claim can take; forks of
    another seed's trunk; orders counted as pairs.
    """
    path = tmp_path / "set"
    recipe = FOLDER / f"{name}.toml"
    code, _, err = call("run", recipe, "--workers", "0", "--out", path)
    assert code == 0, err
    runs = nk.open_runs(path)
    assert runs.faults == []
    assert set(runs.runs["status"]) == {"done"}
    assert FACTORS[name] <= set(runs.runs.columns)
    assert (path / "report.html").exists()
    [result] = judged_claims(runs)
    assert result.num_pairs == 2
    assert result.num_missing == 0
    code, out, _ = call("status", path)
    assert code == 0
    assert "waiting" not in out
    for run in runs.directories:
        origin = run.manifest.origin
        if run.manifest.recipe.get("start"):
            assert origin["run_id"].endswith(f"-seed{run.manifest.seed}")
        else:
            assert not origin
