"""Histograms of per-example gradient norms."""

import math

import numpy as np
import pytest
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import example_norm_histograms
from noisekit.records.schema import table
from tests.figures import samples

NAME = "example_grad_sq_norm"


@pytest.fixture
def examples() -> DataFrame:
    return samples.examples(num_seeds=2)


def test_the_column_is_that_of_the_store() -> None:
    """Catches: a name that the examples table does not have."""
    assert NAME in {column.name for column in table("examples").columns}


def test_counts_are_those_of_the_logarithms(examples: DataFrame) -> None:
    """Catches: bins of equal width in the norm itself; a lost extreme."""
    bins = example_norm_histograms(examples, snapshots=["start"], num_bins=12).table
    here = examples[
        (examples["snapshot"] == "start") & (examples["arm"] == "large_low")
    ]
    rows = bins[bins["arm"] == "large_low"]
    edges = np.log([*rows["left"], rows["right"].iloc[-1]])
    assert np.diff(edges) == pytest.approx(np.diff(edges)[0])
    counts, _ = np.histogram(np.log(here[NAME]), bins=edges)
    assert rows["count"].tolist() == counts.tolist()
    assert rows["count"].sum() == 2 * samples.NUM_EXAMPLES
    assert rows["share"].sum() == pytest.approx(1.0)
    assert rows["median"].iloc[0] == here[NAME].median()


def test_norms_of_zero_count_though_they_have_no_place(examples: DataFrame) -> None:
    """Catches: shares and medians of the positive norms only."""
    start = examples[examples["snapshot"] == "start"].copy()
    arm = start["arm"].iloc[0]
    own = start.index[start["arm"] == arm]
    start.loc[own[: len(own) // 4], NAME] = 0.0
    plot = example_norm_histograms(start, snapshots=["start"])
    rows = plot.table[plot.table["arm"] == arm]
    assert rows["share"].sum() == pytest.approx(0.75)
    assert rows["median"].iloc[0] == start.loc[own, NAME].median()
    assert f"{len(own) // 4} norms of zero have no place on the axis" in plot.caption


def test_the_caption_counts_missing_norms(examples: DataFrame) -> None:
    """Catches: NaN counted as zero, or dropped in silence."""
    examples.loc[examples.index[:7], NAME] = math.nan
    plot = example_norm_histograms(examples, snapshots=["start"])
    assert "Left out: 7 values" in plot.caption
    assert "of zero" not in plot.caption


def test_all_panels_share_their_bins(examples: DataFrame) -> None:
    """Catches: panels that cannot be compared."""
    bins = example_norm_histograms(examples, snapshots=["start", "loss_0.05"]).table
    first, second = (
        bins[bins["snapshot"] == name].groupby("arm")["left"].apply(list).iloc[0]
        for name in ("start", "loss_0.05")
    )
    assert first == second


def test_a_snapshot_without_norms_is_refused(examples: DataFrame) -> None:
    """Catches: a blank panel; an error that does not say what there is."""
    with pytest.raises(EmptyDataError) as refused:
        example_norm_histograms(examples, snapshots=["start", "final"])
    assert str(refused.value) == (
        "figure 'example_norm_histograms' needs per-example gradient norms at the "
        "snapshots start, final, got none at final (there are some at: loss_0.05, "
        "start); measure them there or name others."
    )


def test_tables_that_cannot_be_drawn_are_refused(examples: DataFrame) -> None:
    """Catches: blank panels."""
    with pytest.raises(UsageError, match=f"without {NAME}"):
        example_norm_histograms(examples.drop(columns=NAME), snapshots=["start"])
    with pytest.raises(EmptyDataError, match="there are some at: none"):
        example_norm_histograms(
            examples.assign(**{NAME: math.nan}), snapshots=["start"]
        )
    with pytest.raises(EmptyDataError, match="needs finite and positive values"):
        example_norm_histograms(examples.assign(**{NAME: 0.0}), snapshots=["start"])
