"""From tables to numbers: what is averaged, what is refused, what is counted."""

import math

import numpy as np
import pytest
from pandas import DataFrame
from scipy import stats

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import summaries


def test_interval_is_the_textbook_one() -> None:
    """Catches: a normal quantile, or the n denominator, at few seeds."""
    values = [0.031, 0.027, 0.040, 0.035]
    found = summaries.mean_interval(values)
    want = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found["value"] == pytest.approx(np.mean(values))
    assert (found["low"], found["high"]) == pytest.approx(want)
    assert found["num_seeds"] == 4


def test_log_interval_is_that_of_the_logs() -> None:
    """Catches: the arithmetic mean on a log axis."""
    values = [1.0, 10.0, 100.0]
    found = summaries.mean_interval(values, log=True)
    logs = np.log(values)
    want = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
    assert found["value"] == pytest.approx(10.0)
    assert (found["low"], found["high"]) == pytest.approx(np.exp(want))


def test_one_seed_has_no_interval() -> None:
    """Catches: an interval of width zero, which would claim certainty."""
    found = summaries.mean_interval([2.0])
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])


def test_a_mean_needs_every_seed() -> None:
    """Catches: a mean over survivors once a seed has stopped."""
    rows = DataFrame({"seed": [0, 0, 1], "step": [0, 1, 0], "value": [1.0, 5.0, 3.0]})
    curve = summaries.mean_curve(rows, at=["step"], log=False)
    assert curve["step"].tolist() == [0]
    assert curve["value"].tolist() == [2.0]


def test_a_missing_column_is_named_with_what_there_is() -> None:
    """Catches: a KeyError from inside pandas."""
    with pytest.raises(UsageError) as refused:
        summaries.require_columns(
            DataFrame({"arm": ["a"]}), ["arm", "seed"], figure="curves"
        )
    assert str(refused.value) == (
        "figure 'curves' needs the columns arm, seed, got a table without seed (it has "
        "arm); join what is missing or rename it."
    )


def test_an_empty_table_is_refused() -> None:
    """Catches: a blank panel for missing data."""
    with pytest.raises(EmptyDataError, match="got an empty table") as bad:
        summaries.require_columns(
            DataFrame({"arm": [], "value": []}), ["value"], figure="curves"
        )
    assert "check that the runs recorded it" in str(bad.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_a_table_without_a_drawable_value_is_refused(bad: float) -> None:
    """Catches: a log axis of zeros, drawn empty."""
    frame = DataFrame({"x": [1.0, 2.0], "value": [bad, bad]})
    with pytest.raises(EmptyDataError) as refused:
        summaries.drawable(frame, ["x", "value"], figure="f", positive=["value"])
    assert "needs finite and positive values of x, value, got none in 2 rows" in str(
        refused.value
    )


def test_what_cannot_be_drawn_is_counted() -> None:
    """Catches: zero kept on a log axis; a gap that the caption does not mention."""
    frame = DataFrame({"value": [1.0, 0.0, math.nan, math.inf, -2.0]})
    kept, dropped = summaries.drawable(frame, ["value"], figure="f", positive=["value"])
    assert kept["value"].tolist() == [1.0]
    assert dropped == 4
    kept, dropped = summaries.drawable(frame, ["value"], figure="f")
    assert kept["value"].tolist() == [1.0, 0.0, -2.0]
    assert dropped == 2


def test_left_out_speaks_in_the_right_number() -> None:
    """Catches: '1 values are'."""
    assert summaries.left_out(0) == ""
    assert summaries.left_out(1).startswith(" Left out: 1 value that is not finite")
    assert summaries.left_out(3, "pairs").startswith(" Left out: 3 pairs that are not")


def boxes() -> DataFrame:
    return DataFrame(
        {
            "arm": ["a"] * 4,
            "seed": [0, 0, 1, 1],
            "snapshot": "final",
            "quantity": "epsilon_sharpness",
            "variant": ["epsilon=0.001", "epsilon=0.0005"] * 2,
            "value": [1.0, 0.5, 2.0, 0.7],
        }
    )


def test_one_variant_is_taken_and_never_two_mixed() -> None:
    """Catches: two boxes of epsilon-sharpness pooled as if they were seeds."""
    asked = {"snapshots": ["final"], "figure": "f"}
    first = summaries.quantity_values(boxes(), "epsilon_sharpness", **asked)
    assert first["value"].tolist() == [1.0, 2.0]
    assert set(first["variant"]) == {"epsilon=0.001"}
    named = summaries.quantity_values(
        boxes(), "epsilon_sharpness", variant="epsilon=0.0005", **asked
    )
    assert named["value"].tolist() == [0.5, 0.7]
    with pytest.raises(UsageError, match=r"got only 'epsilon=0.001', 'epsilon=0.0005'"):
        summaries.quantity_values(
            boxes(), "epsilon_sharpness", variant="epsilon=1", **asked
        )


def test_two_values_of_one_seed_are_refused() -> None:
    """Catches: a run that was read twice and counts as two seeds."""
    twice = boxes().assign(variant="")
    with pytest.raises(
        UsageError, match="one value of epsilon_sharpness per arm, seed"
    ):
        summaries.quantity_values(
            twice, "epsilon_sharpness", snapshots=["final"], figure="f"
        )


def test_an_absent_snapshot_is_named() -> None:
    """Catches: a panel silently missing."""
    with pytest.raises(EmptyDataError) as refused:
        summaries.quantity_values(
            boxes(), "epsilon_sharpness", snapshots=["final", "start"], figure="f"
        )
    assert "got none at start (snapshots in the table: final)" in str(refused.value)
