"""Gradient noise over training: parts are averaged, bounds are drawn as bounds."""

import math

import numpy as np
import pytest
from pandas import DataFrame
from scipy import stats

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import noise_over_training
from noisekit.figures.noise import windowed_noise
from tests.figures import samples


def readings(signal: float, spread: float, *, num_seeds: int = 8) -> DataFrame:
    """Four updates per seed; the debiased squared norm is ``signal`` ± ``spread``."""
    random = np.random.default_rng(0)
    rows = []
    for seed in range(num_seeds):
        for step in range(4):
            squared = signal + random.normal(0, spread)
            variance = 10.0 + random.normal(0, 0.5)
            rows.append(
                {
                    "arm": "a",
                    "seed": seed,
                    "step": step,
                    "batch_size": 16,
                    "grad_sq_norm": abs(squared) + variance / 16,
                    "variance_trace": variance,
                    "debiased_grad_sq_norm": squared,
                }
            )
    return DataFrame(rows)


def fieller(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Return the ends of Fieller's set of mean(above) / mean(below), by its roots."""
    n = len(above)
    t2 = stats.t.ppf(0.975, n - 1) ** 2
    (vx, c), (_, vy) = np.cov(above, below) / n
    x, y = above.mean(), below.mean()
    low, high = np.roots([y**2 - t2 * vy, -2 * (x * y - t2 * c), x**2 - t2 * vx])[::-1]
    return tuple(sorted((float(low), float(high))))


def test_noise_scale_divides_averages_over_seeds() -> None:
    """Catches: a mean of ratios; readings of one seed counted as samples."""
    frame = readings(2.0, 0.3)
    table = windowed_noise(frame, num_windows=1).set_index("quantity")
    means = frame.groupby("seed")[["variance_trace", "debiased_grad_sq_norm"]].mean()
    above, below = means.to_numpy().T
    row = table.loc["simple_noise_scale"]
    assert row["value"] == pytest.approx(above.mean() / below.mean())
    assert (row["low"], row["high"]) == pytest.approx(fieller(above, below))
    assert row["num_samples"] == 8
    assert row["status"] == "ok"


def test_one_seed_is_averaged_over_its_readings() -> None:
    """Catches: no interval at all with one run."""
    frame = readings(2.0, 0.1, num_seeds=1)
    table = windowed_noise(frame, num_windows=1).set_index("quantity")
    row = table.loc["variance_trace"]
    values = frame["variance_trace"]
    want = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert (row["low"], row["high"]) == pytest.approx(want)
    assert "over readings" in noise_over_training(frame).caption


def test_windows_are_of_equal_length_and_lose_no_reading() -> None:
    """Catches: the last update falling out of the last window."""
    steps = np.arange(1, 101)
    frame = DataFrame({"arm": "a", "seed": 0, "step": steps, "grad_sq_norm": 1.0})
    frame = frame.assign(variance_trace=1.0, debiased_grad_sq_norm=1.0)
    table = windowed_noise(frame, num_windows=5).query("quantity == 'variance_trace'")
    assert table["num_samples"].tolist() == [20] * 5
    assert table["step"].tolist() == [10.5, 30.5, 50.5, 70.5, 90.5]


def test_an_unresolved_window_is_drawn_as_a_bound() -> None:
    """Catches: a point estimate where the confidence set has no upper end."""
    frame = readings(0.1, 0.4)
    plot = noise_over_training(frame, num_windows=1)
    [row] = plot.table.query("quantity == 'simple_noise_scale'").to_dict("records")
    assert row["status"] == "not_resolved"
    assert math.isinf(row["high"])
    assert math.isfinite(row["value"])
    assert "Open triangles: 1 window whose noise scale is not resolved" in plot.caption
    ax = plot.figure.axes[2]
    [triangle] = [
        line for line in ax.lines if line.get_marker() == "^" and len(line.get_xdata())
    ]
    assert triangle.get_markerfacecolor() == "white"
    drawn = [y for line in ax.lines for y in line.get_ydata() if np.isfinite(y)]
    assert row["value"] not in drawn
    names = [text.get_text() for text in plot.figure.legends[0].get_texts()]
    assert "not resolved: here or higher" in names


def test_a_set_without_any_bound_stands_on_the_edge() -> None:
    """A squared norm that is resolved below zero tells nothing of the ratio.

    Catches: a negative noise scale; a triangle at zero, which a log axis drops.
    """
    plot = noise_over_training(readings(-0.5, 0.01), num_windows=1)
    [row] = plot.table.query("quantity == 'simple_noise_scale'").to_dict("records")
    assert (row["status"], row["low"]) == ("not_resolved", 0.0)
    assert "on the lower edge, 1 with no bound." in plot.caption
    [edge] = [
        line
        for line in plot.figure.axes[2].lines
        if line.get_marker() == "^" and len(line.get_xdata())
    ]
    assert 0 < edge.get_ydata()[0] < 0.1


def test_resolved_windows_leave_no_talk_of_triangles() -> None:
    """Catches: '0 windows are not resolved'."""
    plot = noise_over_training(readings(2.0, 0.1), num_windows=2)
    assert "triangle" not in plot.caption
    assert len(plot.figure.legends[0].get_texts()) == 1


def test_the_batch_size_is_in_sight() -> None:
    """Catches: limits from the noise scale alone, which hide the batch size."""
    frame = readings(2.0, 0.1).assign(batch_size=4096)
    ax = noise_over_training(frame, num_windows=2).figure.axes[2]
    assert ax.get_ylim()[1] > 4096


def test_the_caption_counts_readings_left_out() -> None:
    """Catches: readings without an estimate dropped in silence."""
    frame = readings(2.0, 0.1)
    frame.loc[:4, "variance_trace"] = math.nan
    assert "Left out: 5 readings" in noise_over_training(frame, num_windows=2).caption


def test_negative_squared_norms_are_averaged_not_dropped() -> None:
    """Catches: a debiased squared norm that may be negative cut off at zero."""
    frame = readings(0.5, 1.0)
    assert (frame["debiased_grad_sq_norm"] < 0).any()
    table = windowed_noise(frame, num_windows=1).set_index("quantity")
    want = frame["variance_trace"].mean() / frame["debiased_grad_sq_norm"].mean()
    assert table.loc["simple_noise_scale", "value"] == pytest.approx(want)


def test_tables_that_cannot_be_drawn_are_refused() -> None:
    """Catches: blank panels."""
    steps = samples.steps(num_seeds=1)
    with pytest.raises(UsageError, match="without variance_trace"):
        noise_over_training(steps.drop(columns="variance_trace"))
    with pytest.raises(EmptyDataError, match="got an empty table"):
        noise_over_training(steps.iloc[:0])
    with pytest.raises(EmptyDataError, match="needs finite values of step"):
        noise_over_training(steps.assign(variance_trace=math.nan))
