"""Learning curves: means, bands, cut columns and thinned lines."""

import math

import numpy as np
import pytest
from pandas import DataFrame
from scipy import stats

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.core.vocabulary import quantity
from noisekit.figures import training_curves
from tests.figures import samples

SEEDS = 4


@pytest.fixture(scope="module")
def evaluations() -> DataFrame:
    return samples.evaluations(num_seeds=SEEDS)


def test_mean_loss_is_geometric_and_mean_error_is_not(evaluations: DataFrame) -> None:
    """Catches: one scale for both; intervals of the wrong scale."""
    plot = training_curves(evaluations, quantities=["train_loss", "test_error"])
    here = evaluations[
        (evaluations["arm"] == "small_low") & (evaluations["step"] == 960)
    ]
    means = plot.table.query("kind == 'mean' and arm == 'small_low' and step == 960")
    loss, error = (
        means[means["quantity"] == name].iloc[0]
        for name in ("train_loss", "test_error")
    )
    logs = np.log(here["train_loss"])
    assert loss["value"] == pytest.approx(stats.gmean(here["train_loss"]))
    low, high = stats.t.interval(0.95, SEEDS - 1, logs.mean(), stats.sem(logs))
    assert (loss["low"], loss["high"]) == pytest.approx((np.exp(low), np.exp(high)))
    assert error["value"] == pytest.approx(here["test_error"].mean())


def test_the_table_holds_every_evaluation_once(evaluations: DataFrame) -> None:
    """Catches: thinning the table with the lines; a copy of it for each axis."""
    table = training_curves(evaluations, quantities=["train_loss"]).table
    seeds = table[table["kind"] == "seed"]
    assert len(seeds) == len(evaluations)
    assert sorted(seeds["value"]) == sorted(evaluations["train_loss"])
    assert {"epoch", "step"} <= set(table.columns)


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    """Catches: megabytes of path; a curve that ends too early for being thinned."""
    steps = np.arange(1000)
    rows = DataFrame({"arm": "a", "seed": 0, "step": steps, "train_loss": 2.0 + steps})
    plot = training_curves(rows, quantities=["train_loss"], against=["step"])
    [ax] = plot.figure.axes
    for line in ax.lines:
        assert len(line.get_xdata()) <= 100
        assert line.get_xdata()[0] == 0
        assert line.get_xdata()[-1] == 999
    assert "at most 48 (seeds) or 96 (means) evaluations" in plot.caption


def test_a_column_ends_where_its_first_arm_ends(evaluations: DataFrame) -> None:
    """Catches: short arms squeezed to the left edge by ones eight times as long."""
    plot = training_curves(evaluations, quantities=["train_loss"])
    left, right = plot.figure.axes
    epochs = evaluations.groupby("arm")["epoch"].max()
    assert epochs.max() > 7 * epochs.min()
    assert left.get_xlim()[1] < 1.1 * epochs.min()
    assert right.get_xlim()[1] >= evaluations["step"].max()
    assert "A column ends where its first arm ends." in plot.caption
    longest = plot.table.loc[plot.table["kind"] == "seed", "epoch"].max()
    assert longest == epochs.max()


def test_no_column_is_cut_where_that_would_hide_an_arm(evaluations: DataFrame) -> None:
    """Catches: one arm that stopped early hiding the rest of all others."""
    early = (evaluations["arm"] == "small_low") & (evaluations["step"] > 100)
    plot = training_curves(evaluations[~early], quantities=["train_loss"])
    for ax, axis in zip(plot.figure.axes, ("epoch", "step"), strict=True):
        assert ax.get_xlim()[1] >= evaluations[axis].max()
    assert "A column ends" not in plot.caption


def test_the_caption_counts_losses_that_have_no_logarithm(
    evaluations: DataFrame,
) -> None:
    """Catches: zero and NaN dropped in silence."""
    broken = evaluations.copy()
    broken.loc[broken.index[:3], "train_loss"] = [0.0, math.nan, math.inf]
    plot = training_curves(broken, quantities=["train_loss"])
    assert "Left out: 3 values" in plot.caption
    assert (plot.table["kind"] == "seed").sum() == len(evaluations) - 3


def test_an_error_of_zero_has_a_place(evaluations: DataFrame) -> None:
    """Catches: a log axis that swallows perfect training accuracy."""
    assert (evaluations["train_error"] == 0).any()
    plot = training_curves(evaluations, quantities=["train_error"], against=["step"])
    [ax] = plot.figure.axes
    assert ax.get_yscale() == "symlog"
    assert ax.get_ylim()[0] == 0
    assert "Left out" not in plot.caption


def test_labels_come_from_the_vocabulary(evaluations: DataFrame) -> None:
    """Catches: labels written by hand, which drift from the glossary."""
    plot = training_curves(evaluations, quantities=["train_loss"])
    left, right = plot.figure.axes
    assert left.get_xlabel() == quantity("epoch").axis_label
    assert right.get_xlabel() == quantity("step").axis_label
    assert left.get_ylabel().replace("\n", " ") == quantity("train_loss").axis_label


def test_by_default_what_was_recorded_is_drawn(evaluations: DataFrame) -> None:
    """Catches: a crash where a run has no validation set."""
    plot = training_curves(evaluations.drop(columns="validation_loss"))
    assert list(dict.fromkeys(plot.table["quantity"])) == ["train_loss", "test_error"]
    with pytest.raises(
        EmptyDataError, match="needs one of train_loss, validation_loss"
    ):
        training_curves(evaluations[["arm", "seed", "step", "epoch"]])


def test_a_missing_axis_and_a_column_of_nan_are_refused(
    evaluations: DataFrame,
) -> None:
    """Catches: blank panels."""
    with pytest.raises(UsageError, match="without examples_seen"):
        training_curves(
            evaluations.drop(columns="examples_seen"), against=["examples_seen"]
        )
    with pytest.raises(EmptyDataError, match="needs finite and positive values of"):
        training_curves(
            evaluations.assign(train_loss=math.nan), quantities=["train_loss"]
        )
