"""The figure of what a recipe plans: lines, shared lines, and single points."""

import pandas as pd

from noisekit.figures import Plot, timeline
from tests.figures import samples


def lines_of(plot: Plot, panel: int) -> list[tuple[list[float], list[float]]]:
    return [
        (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in plot.figure.axes[panel].lines
    ]


def test_each_setting_is_drawn_against_epochs_and_updates() -> None:
    """Jumps are vertical, and the axes of updates end where each arm ends.

    Catches: updates of one arm for all; a jump drawn as a slope; a value interpolated.
    """
    plot = timeline(samples.planned_settings())
    assert [ax.get_xlabel() for ax in plot.figure.axes][-2:] == ["Epoch", "Update"]
    assert lines_of(plot, 0)[1] == (
        [0.0, 2.0, 2.0, 4.0, 4.0, 6.0],
        [32.0, 32.0, 64.0, 64.0, 128.0, 128.0],
    )
    assert lines_of(plot, 1)[1][0] == [0.0, 64.0, 64.0, 96.0, 96.0, 112.0]
    assert lines_of(plot, 3)[2] == ([0.0, 48.0], [0.1, 0.1])
    assert len(plot.figure.axes) == 4


def test_momentum_and_microbatch_are_drawn_where_they_tell_something() -> None:
    """Catches: panels of one flat line; a micro-batch that is the batch drawn twice."""
    table = samples.planned_settings()
    changed = table.assign(momentum=[0.9, 0.5] * (len(table) // 2))
    labels = [ax.get_ylabel() for ax in timeline(changed).figure.axes[::2]]
    assert labels[2].startswith("Momentum")
    ghost = table.assign(microbatch=table["batch_size"].clip(upper=64))
    labels = [ax.get_ylabel() for ax in timeline(ghost).figure.axes[::2]]
    assert labels[2].startswith("Microbatch")


def test_arms_that_plan_the_same_share_a_line() -> None:
    """Catches: forty lines on top of each other; a legend that hides that they are."""
    table = samples.planned_settings()
    copies = [table[table["arm"] == "small"].assign(arm=f"s{i}") for i in range(12)]
    plot = timeline(pd.concat([table, *copies]))
    [legend] = plot.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "small and 12 more",
        "growing",
        "large",
    ]
    assert set(plot.table["arm"]) == {"small", "growing", "large"}
    assert "share a line" in plot.caption


def test_many_lines_have_no_legend() -> None:
    """Catches: a legend that is larger than the figure."""
    table = samples.planned_settings()
    one = table[table["arm"] == "small"]
    many = [one.assign(arm=f"a{i}", learning_rate=2.0**-i) for i in range(12)]
    plot = timeline(pd.concat(many))
    assert not plot.figure.legends
    assert "12 lines; the table names them." in plot.caption


def test_an_arm_that_follows_readings_is_a_point() -> None:
    """Catches: a line to a future that nobody knows."""
    table = samples.planned_settings()
    first = table[table["arm"] == "growing"].head(1).assign(arm="adaptive")
    plot = timeline(pd.concat([table, first]))
    assert lines_of(plot, 0)[3] == ([0.0], [32.0])
    assert "only the first decision is known of adaptive" in plot.caption
