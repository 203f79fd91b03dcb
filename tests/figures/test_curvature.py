"""Sharpness against training loss."""

import math

import pytest
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.core.vocabulary import quantity
from noisekit.figures import sharpness_against_loss
from tests.figures import samples


@pytest.fixture(scope="module")
def tables() -> tuple[DataFrame, DataFrame]:
    return samples.measurements(num_seeds=5), samples.snapshots(num_seeds=5)


def test_each_dot_is_one_run_at_one_snapshot(
    tables: tuple[DataFrame, DataFrame],
) -> None:
    """Catches: sharpness joined to the loss of another snapshot or seed."""
    measured, places = tables
    table = sharpness_against_loss(measured, places).table.query("kind == 'seed'")
    assert len(table) == len(places)
    [dot] = table.query("run_id == 'large_low-seed3' and snapshot == 'loss_0.1'")[
        ["train_loss", "value"]
    ].to_numpy()
    [loss] = places.query("run_id == 'large_low-seed3' and snapshot == 'loss_0.1'")[
        "train_loss"
    ]
    [value] = measured.query(
        "run_id == 'large_low-seed3' and snapshot == 'loss_0.1' "
        "and quantity == 'lambda_max'"
    )["value"]
    assert dot.tolist() == [loss, value]


def test_lines_join_medians_as_the_loss_falls(
    tables: tuple[DataFrame, DataFrame],
) -> None:
    """Catches: means, which one seed can move; a line in the order of the names."""
    table = sharpness_against_loss(*tables).table
    medians = table.query("kind == 'median' and arm == 'small_low'")
    seeds = table.query("kind == 'seed' and arm == 'small_low'")
    for row in medians.to_dict("records"):
        here = seeds[seeds["snapshot"] == row["snapshot"]]
        assert row["value"] == here["value"].median()
    assert medians["train_loss"].is_monotonic_decreasing


def test_loss_falls_to_the_right_and_labels_are_the_vocabularys(
    tables: tuple[DataFrame, DataFrame],
) -> None:
    """Catches: training drawn backwards."""
    [ax] = sharpness_against_loss(*tables).figure.axes
    left, right = ax.get_xlim()
    assert left > right > 0
    assert ax.get_xlabel().startswith(quantity("train_loss").axis_label)
    assert ax.get_ylabel().replace("\n", " ") == quantity("lambda_max").axis_label


def test_what_did_not_converge_is_open_and_counted(
    tables: tuple[DataFrame, DataFrame],
) -> None:
    """Catches: a solver's last iterate drawn as a result."""
    measured = tables[0].copy()
    here = measured[measured["quantity"] == "lambda_max"].index[:3]
    measured.loc[here, "status"] = "not_converged"
    plot = sharpness_against_loss(measured, tables[1])
    assert "Open dots: 3 not converged." in plot.caption
    [ax] = plot.figure.axes
    empty = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert sum(len(line.get_xdata()) for line in empty) == 3


def test_the_caption_counts_what_has_no_logarithm(
    tables: tuple[DataFrame, DataFrame],
) -> None:
    """Catches: negative curvature dropped in silence."""
    measured = tables[0].copy()
    here = measured[measured["quantity"] == "lambda_max"].index[:2]
    measured.loc[here, "value"] = [-0.5, math.nan]
    plot = sharpness_against_loss(measured, tables[1])
    assert "Left out: 2 values" in plot.caption


def test_thresholds_are_drawn_or_said_to_be_out_of_sight(
    tables: tuple[DataFrame, DataFrame],
) -> None:
    """Catches: an axis stretched to a line far away; a line that is just missing."""
    limits = {"small_low": 40.0, "small_high": 5.0, "large_high": 4e6}
    plot = sharpness_against_loss(*tables, thresholds=limits)
    [ax] = plot.figure.axes
    assert ax.get_ylim()[1] < 1e4
    heights = {line.get_ydata()[0] for line in ax.lines if len(line.get_ydata()) == 2}
    assert {40.0, 5.0} <= heights
    assert "out of the picture for batch 128, rate 0.4." in plot.caption


def test_an_unmeasured_quantity_says_what_was_measured(
    tables: tuple[DataFrame, DataFrame],
) -> None:
    """Catches: a blank figure."""
    with pytest.raises(
        EmptyDataError, match="'lambda_min', got only edge_of_stab"
    ) as no:
        sharpness_against_loss(*tables, measured="lambda_min")
    assert "measure.everywhere" in str(no.value)


def test_tables_of_different_runs_are_refused(
    tables: tuple[DataFrame, DataFrame],
) -> None:
    """Catches: an inner join that leaves nothing."""
    measured, places = tables
    with pytest.raises(EmptyDataError, match="take both tables from the same runs"):
        sharpness_against_loss(measured, places.assign(run_id="other"))
    with pytest.raises(UsageError, match="without train_loss"):
        sharpness_against_loss(measured, places.drop(columns="train_loss"))
    with pytest.raises(EmptyDataError, match="needs finite and positive values"):
        sharpness_against_loss(measured.assign(value=math.nan), places)
