"""The figure of steps against examples over batch sizes."""

import numpy as np
import pytest

import noisekit as nk
from tests.figures import samples


def test_lines_cross_at_the_noise_scale_where_both_are_two():
    plot = nk.figures.batch_size_tradeoff(samples.tradeoff(noise_scale=128.0))
    at = plot.table[plot.table["batch_size"] == 128.0]
    assert list(at["quantity"]) == ["steps", "examples"]
    assert list(at["value"]) == [2.0, 2.0]
    assert (plot.table["low"] <= plot.table["value"]).all()
    assert (plot.table["value"] <= plot.table["high"]).all()
    assert plot.table["present"].sum() == 2
    assert "no upper bound" not in plot.caption


def test_unbounded_noise_scale_is_drawn_and_said():
    plot = nk.figures.batch_size_tradeoff(
        samples.tradeoff(noise_scale=np.nan, low=60.0, high=np.inf)
    )
    steps = plot.table[plot.table["quantity"] == "steps"]
    assert np.isinf(steps["high"]).all()
    assert steps["value"].isna().all()
    assert "The noise scale has no upper bound." in plot.caption


def test_nothing_known_is_refused():
    nothing = samples.tradeoff(np.nan, np.nan, np.nan)
    with pytest.raises(nk.NoisekitError, match="got none; take more readings"):
        nk.figures.batch_size_tradeoff(nothing)
    with pytest.raises(nk.NoisekitError, match="steps_low"):
        nk.figures.batch_size_tradeoff(nothing.drop(columns="steps_low"))
