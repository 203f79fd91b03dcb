"""Arms side by side."""

import math

import numpy as np
import pytest
from pandas import DataFrame
from scipy import stats

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.core.vocabulary import quantity
from noisekit.figures import paired_arms
from tests.figures import samples


@pytest.fixture(scope="module")
def measured() -> DataFrame:
    return samples.measurements(num_seeds=5)


def test_every_seed_is_a_row_and_the_mean_is_geometric(measured: DataFrame) -> None:
    """Catches: an arithmetic mean beside a log axis; a seed that is lost."""
    plot = paired_arms(measured, "lambda_max", snapshots=["loss_0.05"])
    values = measured.query(
        "quantity == 'lambda_max' and snapshot == 'loss_0.05' and arm == 'large_low'"
    )["value"]
    rows = plot.table[plot.table["arm"] == "large_low"]
    assert sorted(rows.loc[rows["kind"] == "seed", "value"]) == sorted(values)
    [mean] = rows[rows["kind"] == "mean"].to_dict("records")
    logs = np.log(values)
    low, high = stats.t.interval(0.95, 4, logs.mean(), stats.sem(logs))
    assert mean["value"] == pytest.approx(stats.gmean(values))
    assert (mean["low"], mean["high"]) == pytest.approx((np.exp(low), np.exp(high)))
    assert "geometric mean" in plot.caption


def test_a_linear_scale_takes_the_plain_mean_and_keeps_zero() -> None:
    """Catches: an error of zero dropped as if the axis were logarithmic."""
    table = samples.snapshots(num_seeds=3)
    table.loc[table.index[table["snapshot"] == "final"][0], "test_error"] = 0.0
    plot = paired_arms(table, "test_error", snapshots=["final"], scale="linear")
    first = table["arm"].iloc[0]
    values = table[(table["arm"] == first) & (table["snapshot"] == "final")]
    [mean] = plot.table.query("kind == 'mean' and arm == @first")["value"]
    assert mean == pytest.approx(values["test_error"].mean())
    assert "geometric" not in plot.caption
    assert "Left out" not in plot.caption


def test_the_caption_counts_what_a_log_axis_cannot_show(measured: DataFrame) -> None:
    """Catches: a negative eigenvalue dropped in silence."""
    broken = measured.copy()
    here = broken.query("quantity == 'lambda_max' and snapshot == 'final'").index
    broken.loc[here[:2], "value"] = [-1.0, math.nan]
    plot = paired_arms(broken, "lambda_max", snapshots=["final"])
    assert "Left out: 2 values" in plot.caption


def test_the_variant_is_named_in_the_caption(measured: DataFrame) -> None:
    """Catches: a box size that the reader cannot know."""
    table = measured.assign(variant="epsilon=0.001")
    plot = paired_arms(table, "epsilon_sharpness", snapshots=["final"])
    assert plot.caption.startswith("Epsilon-sharpness (epsilon=0.001) at final.")


def test_an_arm_without_a_value_is_refused(measured: DataFrame) -> None:
    """Catches: a gap where an arm should be."""
    gone = measured[
        ~((measured["arm"] == "large_low") & (measured["snapshot"] == "final"))
    ]
    with pytest.raises(EmptyDataError) as refused:
        paired_arms(gone, "lambda_max", snapshots=["loss_0.05", "final"])
    assert str(refused.value) == (
        "figure 'paired_arms' needs a value of arm 'large_low' at snapshot 'final', "
        "got none that can be drawn; leave the arm or the snapshot out."
    )
    assert paired_arms(gone, "lambda_max", snapshots=["final"], arms=["small_low"])


def test_a_table_of_another_shape_is_refused(measured: DataFrame) -> None:
    """Catches: a KeyError."""
    with pytest.raises(UsageError, match="without seed"):
        paired_arms(measured.drop(columns="seed"), "lambda_max", snapshots=["final"])


def test_arms_are_named_below_or_in_a_legend(measured: DataFrame) -> None:
    """Catches: names over one another in narrow panels; no names at all."""
    roomy = paired_arms(measured, "lambda_max", snapshots=["final"])
    narrow = paired_arms(
        measured, "lambda_max", snapshots=["loss_1", "loss_0.5", "loss_0.2", "final"]
    )
    arms = {arm.replace("_", " ") for arm in samples.ARMS}
    below = {label.get_text() for label in roomy.figure.axes[0].get_xticklabels()}
    assert below == arms
    assert not roomy.figure.legends
    [legend] = narrow.figure.legends
    assert {text.get_text() for text in legend.get_texts()} == arms


def test_the_label_comes_from_the_vocabulary(measured: DataFrame) -> None:
    """Catches: a label without the unit."""
    [ax] = paired_arms(measured, "lambda_max", snapshots=["final"]).figure.axes
    assert ax.get_ylabel().replace("\n", " ") == quantity("lambda_max").axis_label
