"""Paired ratios of the measures that are not tested."""

import math

import numpy as np
import pytest
from matplotlib.text import Annotation
from pandas import DataFrame
from scipy import stats

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import descriptive_ratios, paired_ratios
from tests.figures import samples

PAIR = {
    "snapshot": "loss_0.05",
    "treatment": "large_low",
    "reference": "small_low",
    "comparison": "same rate",
}


@pytest.fixture(scope="module")
def measured() -> DataFrame:
    return samples.measurements(num_seeds=6)


def at(measured: DataFrame, arm: str) -> "np.ndarray":
    rows = measured.query(
        "quantity == 'hessian_trace' and snapshot == 'loss_0.05' and arm == @arm"
    )
    return rows.sort_values("seed")["value"].to_numpy()


def test_ratio_is_the_mean_log_ratio_of_pairs(measured: DataFrame) -> None:
    """Catches: a ratio of means; seeds paired by their order in the table."""
    shuffled = measured.sample(frac=1, random_state=0)
    [row] = paired_ratios(shuffled, quantities=["hessian_trace"], **PAIR).to_dict(
        "records"
    )
    logs = np.log(at(measured, "large_low") / at(measured, "small_low"))
    low, high = stats.t.interval(0.95, 5, logs.mean(), stats.sem(logs))
    assert row["ratio"] == pytest.approx(np.exp(logs.mean()))
    assert (row["low"], row["high"]) == pytest.approx((np.exp(low), np.exp(high)))
    assert (row["num_pairs"], row["num_left_out"]) == (6, 0)


def test_two_negative_values_are_no_pair(measured: DataFrame) -> None:
    """Catches: minus over minus taken as a ratio; a lost seed that is not counted."""
    broken = measured.copy()
    here = broken["quantity"].eq("hessian_trace") & broken["snapshot"].eq("loss_0.05")
    broken.loc[here & (broken["seed"] == 0), "value"] = -3.0
    only_above = (broken["seed"] == 2) & (broken["arm"] == "large_low")
    broken.loc[here & only_above, "value"] = -3.0
    broken = broken[~(here & (broken["seed"] == 1) & (broken["arm"] == "small_low"))]
    ratios = paired_ratios(broken, quantities=["hessian_trace"], **PAIR)
    assert ratios["num_pairs"].tolist() == [3]
    assert ratios["num_left_out"].tolist() == [3]
    assert "Left out: 3 pairs" in descriptive_ratios(ratios).caption


def test_variants_are_not_averaged(measured: DataFrame) -> None:
    """Catches: a mean over two boxes of epsilon-sharpness."""
    first = measured.assign(variant="epsilon=0.001")
    second = measured.assign(variant="epsilon=0.0005", value=measured["value"] ** 2)
    both = DataFrame(
        [
            row
            for pair in zip(
                first.to_dict("records"), second.to_dict("records"), strict=True
            )
            for row in pair
        ]
    )
    alone = paired_ratios(first, quantities=["epsilon_sharpness"], **PAIR)
    mixed = paired_ratios(both, quantities=["epsilon_sharpness"], **PAIR)
    assert mixed["ratio"].tolist() == alone["ratio"].tolist()
    assert mixed["variant"].tolist() == ["epsilon=0.001"]


def test_an_unknown_arm_is_refused(measured: DataFrame) -> None:
    """Catches: a KeyError from pandas."""
    with pytest.raises(UsageError) as refused:
        paired_ratios(
            measured, quantities=["hessian_trace"], **PAIR | {"reference": "tiny"}
        )
    assert "need the arms 'large_low' and 'tiny', got no value of tiny" in str(
        refused.value
    )
    assert "name others" in str(refused.value)


def test_ratios_are_written_beside_the_dots(measured: DataFrame) -> None:
    """Catches: numbers that are not those of the table."""
    ratios = paired_ratios(measured, quantities=["hessian_trace"], **PAIR)
    [ax] = descriptive_ratios(ratios).figure.axes
    row = ratios.iloc[0]
    [text] = [a.get_text() for a in ax.texts if isinstance(a, Annotation)]
    numbers = [
        float(part)
        for part in text.replace("[", "").strip("]").replace(",", "").split()
    ]
    assert numbers == pytest.approx([row["ratio"], row["low"], row["high"]], rel=5e-3)


def test_a_measure_without_a_ratio_is_refused(measured: DataFrame) -> None:
    """Catches: an empty row in the figure."""
    ratios = paired_ratios(
        measured, quantities=["hessian_trace", "epsilon_sharpness"], **PAIR
    )
    ratios.loc[1, ["ratio", "low", "high"]] = math.nan
    with pytest.raises(EmptyDataError, match="ratio of epsilon_sharpness in some"):
        descriptive_ratios(ratios)
    with pytest.raises(EmptyDataError, match="got none in 1 rows"):
        descriptive_ratios(ratios.iloc[[1]])
