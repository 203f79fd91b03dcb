"""The choice of the base rate: a rule on validation data, and nothing else."""

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

import noisekit as nk
from tests.analyses.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the analysis as a module."""
    return load_script("rate_choice")


def grid(**cells: tuple[float, float]) -> pd.DataFrame:
    """Return two seeds per rate with this training loss and validation error."""
    rows = [
        {"learning_rate": float(rate[1:]) / 100, "train_loss": loss, "seed": seed}
        | {"validation_error": error}
        for rate, (loss, error) in cells.items()
        for seed in (1, 2)
    ]
    return pd.DataFrame(rows)


def test_lowest_validation_error_among_the_allowed(script: ModuleType) -> None:
    """Rate 0.4 errs least, and eight times it is not in the grid.

    Catches: the best rate of all, whatever becomes of eight times it.
    """
    cells = grid(r5=(0.01, 0.04), r10=(0.01, 0.03), r40=(0.01, 0.01), r80=(0.02, 0.02))
    assert script.base_rate(cells, 8) == pytest.approx(0.1)


def test_rate_whose_multiple_does_not_train_is_left_out(script: ModuleType) -> None:
    """Catches: a multiple that ends at a high loss, or diverged, taken for trained."""
    high = grid(r5=(0.01, 0.04), r10=(0.01, 0.03), r40=(0.01, 0.1), r80=(1.7, 0.7))
    assert script.base_rate(high, 8) == pytest.approx(0.05)
    nan = float("nan")
    gone = grid(r5=(0.01, 0.04), r10=(0.01, 0.03), r40=(0.01, 0.1), r80=(nan, nan))
    assert script.base_rate(gone, 8) == pytest.approx(0.05)


def test_no_rate_at_all(script: ModuleType) -> None:
    """Catches: a crash where nothing can be chosen."""
    assert script.base_rate(grid(r5=(0.01, 0.04)), 8) is None


def test_seeds_that_are_judged_are_not_called_tuning_seeds(
    script: ModuleType, network_runs: Path
) -> None:
    """Also where the arms set no batch size and no rate of their own.

    Catches: the judged seeds passed off as tuning seeds; a KeyError on a set of runs
    that is no grid.
    """
    result = script.analyse(nk.open_runs(network_runs))
    words = " ".join([result.answer, result.plots[0].caption, result.tables[0].caption])
    assert "tuning" not in words
    assert "These runs carry verdicts" in result.warnings[0]
    assert set(result.tables[0].frame["batch_size"]) == {32}
