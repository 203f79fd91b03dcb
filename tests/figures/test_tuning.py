"""The grid of rates: never on test data, and divergence counts against a rate."""

import math

import pytest
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import rate_tuning
from tests.figures import samples

CHOSEN = {16: 0.1, 128: 0.5}


@pytest.fixture
def grid() -> DataFrame:
    return samples.tuning_grid()


def test_a_test_quantity_is_refused(grid: DataFrame) -> None:
    """Catches: a rate chosen on test data."""
    with pytest.raises(UsageError) as refused:
        rate_tuning(
            grid.rename(columns={"validation_error": "test_error"}),
            chosen=CHOSEN,
            measured="test_error",
        )
    assert str(refused.value) == (
        "figure 'rate_tuning' needs a quantity of the validation or training set, got "
        "'test_error'; a rate chosen on test data makes the test unfair."
    )


def test_a_rate_at_which_a_seed_diverged_has_no_mean(grid: DataFrame) -> None:
    """Catches: a mean over the seeds that survived, which flatters the rate."""
    table = rate_tuning(grid, chosen=CHOSEN).table
    too_high = table.query("batch_size == 16 and learning_rate == 1.0")
    assert too_high["value"].notna().sum() == 1
    assert too_high["mean"].isna().all()
    good = table.query("batch_size == 16 and learning_rate == 0.1")
    assert good["mean"].tolist() == pytest.approx([good["value"].mean()] * 3)
    assert good["chosen"].all()
    assert table["chosen"].sum() == 6


def test_the_caption_counts_diverged_runs(grid: DataFrame) -> None:
    """Catches: divergence that leaves no trace; '1 runs'."""
    assert (
        "Crosses at the top: 2 diverged runs."
        in rate_tuning(grid, chosen=CHOSEN).caption
    )
    one = grid[~(grid["validation_error"].isna() & (grid["seed"] == 102))]
    assert (
        "Crosses at the top: 1 diverged run." in rate_tuning(one, chosen=CHOSEN).caption
    )


def test_a_chosen_rate_must_have_been_run(grid: DataFrame) -> None:
    """Catches: a choice that no run stands behind."""
    with pytest.raises(UsageError, match="of batch size 128, got none"):
        rate_tuning(grid, chosen={16: 0.1, 128: 0.3})


def test_a_grid_of_diverged_runs_is_refused(grid: DataFrame) -> None:
    """Catches: an empty picture."""
    with pytest.raises(EmptyDataError, match="check that the runs did not diverge"):
        rate_tuning(grid.assign(validation_error=math.nan), chosen=CHOSEN)
