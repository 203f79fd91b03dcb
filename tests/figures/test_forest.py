"""The judged contrasts."""

import math

import numpy as np
import pytest
from matplotlib.text import Annotation

from noisekit.core.errors import EmptyDataError
from noisekit.figures import claim_forest
from noisekit.stats import Verdict
from tests.figures import samples


def test_differences_of_fractions_are_in_points_and_ratios_as_they_are() -> None:
    """Catches: effect in points beside a margin in fractions; logs left as logs."""
    results = samples.contrasts()
    rows = claim_forest(results).table.set_index("claim")
    for result in results:
        row = rows.loc[result.claim.name]
        factor = 100 if result.claim.scale == "difference" else 1
        assert row["effect"] == pytest.approx(factor * result.effect)
        assert row["low"] == pytest.approx(factor * result.interval.low)
        assert row["high"] == pytest.approx(factor * result.interval.high)
    points = rows.loc["test_error_equal_epochs"]
    assert (points["margin_low"], points["margin_high"]) == pytest.approx((-0.5, 0.5))
    ratio = rows.loc["sharpness_matched_loss"]
    assert (ratio["margin_low"], ratio["margin_high"]) == pytest.approx((1 / 1.5, 1.5))


def test_every_contrast_has_its_verdict_beside_it() -> None:
    """Catches: a contrast without a row, or a verdict on another's row."""
    results = samples.contrasts()
    plot = claim_forest(results)
    written = [
        text.get_text()
        for ax in plot.figure.axes
        for text in ax.texts
        if isinstance(text, Annotation)
    ]
    assert [text for text in written if "[" not in text] == [
        str(result.verdict) for result in results
    ]


def test_each_quantity_has_its_own_axis() -> None:
    """Catches: points of error and ratios on one axis; an axis without a name."""
    plot = claim_forest(samples.contrasts())
    assert [ax.get_xlabel() for ax in plot.figure.axes] == [
        "Test error, difference [points]",
        "Largest Hessian eigenvalue, ratio",
    ]
    assert [ax.get_xscale() for ax in plot.figure.axes] == ["linear", "log"]


def test_all_intervals_lie_inside_the_axis() -> None:
    """Catches: limits from the effects alone, which clip the intervals."""
    plot = claim_forest(samples.contrasts())
    for ax, scale in zip(plot.figure.axes, ("difference", "ratio"), strict=True):
        rows = plot.table[plot.table["scale"] == scale]
        low, high = ax.get_xlim()
        ends = rows.filter(regex="^(low|high|margin)").to_numpy()
        assert low < np.nanmin(ends)
        assert np.nanmax(ends) < high


def test_a_contrast_without_an_effect_keeps_its_row() -> None:
    """Catches: a contrast that disappears because it could not be measured."""
    plot = claim_forest([*samples.contrasts()[:2], samples.unmeasured()])
    last = plot.table.iloc[-1]
    assert last["verdict"] == Verdict.NOT_COMPARABLE
    assert math.isnan(last["effect"])
    assert "Left out: the point of 1 claim without a finite pair." in plot.caption


def test_runs_without_claims_show_no_verdict() -> None:
    """Catches: a verdict on a smoke run."""
    plot = claim_forest(samples.contrasts(verdicts=False))
    assert set(plot.table["verdict"]) == {str(Verdict.NOT_JUDGED)}
    written = {text.get_text() for ax in plot.figure.axes for text in ax.texts}
    assert "no verdict" in written
    assert not written & {"larger", "smaller", "equivalent"}


def test_rows_say_what_stands_over_what() -> None:
    """Catches: a ratio of which the reader cannot know the direction."""
    for arms, words in (
        (None, "large low minus small low"),
        (
            {"large_low": "batch 128", "small_low": "batch 16"},
            "batch 128 minus batch 16",
        ),
    ):
        plot = claim_forest(samples.contrasts(), arms=arms)
        names = [label.get_text() for label in plot.figure.axes[0].get_yticklabels()]
        assert names == [f"Test error at equal epochs, same rate\n{words}"]


def test_no_contrast_is_refused() -> None:
    """Catches: an empty figure in the report."""
    with pytest.raises(EmptyDataError, match="at least one judged claim, got none"):
        claim_forest([])
