"""What a recipe plans for each arm: batch size, rate and momentum over training."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame

from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    TWO_COLUMNS,
    ArmStyle,
    arm_styles,
    described,
    plain_log_ticks,
    styles_of,
)

_ALWAYS = ("batch_size", "learning_rate")
_IF_THEY_DIFFER = ("momentum", "microbatch")
_AXES = ("epoch", "step")
_MOST_NAMED = 10
"""Lines that a legend tells apart."""
_WIDE = 4.0
"""Ratio of largest to smallest value from which on a vertical axis is logarithmic."""


@figure_function
def timeline(
    settings: DataFrame,
    *,
    styles: Mapping[str, ArmStyle] | None = None,
    name: str = "timeline",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw what each arm's settings will be, against epochs and against updates.

    One row a setting: batch size and learning rate, and momentum and micro-batch where
    they change or differ between arms. Arms with the same settings throughout share a
    line. An arm of which only the first decision is known has a point.

    Args:
        settings: Columns ``arm``, ``epoch``, ``step``, ``batch_size`` and
            ``learning_rate``, and ``momentum`` and ``microbatch`` if known; an arm's
            rows in order, joined by lines, two of them at one place where a setting
            jumps.
        styles: From ``arm_styles``; made from the table by default.
        name: Stem of the files.
        ax: Axes of the user's to draw on, one per panel; a new figure by default.

    Returns:
        The plot; its table has the rows that were drawn, one arm of each line.

    Raises:
        EmptyDataError: If no row can be drawn.
    """
    columns = ["arm", *_AXES, *_ALWAYS]
    summaries.require_columns(settings, columns, figure=name)
    table, dropped = summaries.drawable(
        settings, [*_AXES, *_ALWAYS], figure=name, positive=["batch_size"]
    )
    rows = [*_ALWAYS, *_that_differ(table)]
    lines = _lines(table, rows)
    styles = _line_styles(lines, styles or arm_styles(settings))
    drawn_on = canvas(
        len(rows),
        len(_AXES),
        ax=ax,
        size=(TWO_COLUMNS, 0.7 + 1.5 * len(rows)),
        share_x="col",
        share_y="row",
    )
    table = table[table["arm"].isin(lines)]
    for panels, setting in zip(drawn_on.rows, rows, strict=True):
        for panel, axis in zip(panels, _AXES, strict=True):
            _draw(panel, table, axis, setting, styles)
        _scale(panels[0], table[setting])
        panels[0].set_ylabel(described(setting).axis_label)
    for panel, axis in zip(drawn_on.rows[-1], _AXES, strict=True):
        panel.set_xlabel(described(axis).axis_label)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=axis == "step"))
    drawn_on.figure.align_ylabels([panels[0] for panels in drawn_on.rows])
    drawn_on.name_panels()
    if len(lines) <= _MOST_NAMED:
        drawn_on.legend([_handle(styles[arm]) for arm in lines])
    caption = _caption(lines, table) + summaries.left_out(dropped)
    return Plot(drawn_on.figure, table.reset_index(drop=True), name, caption)


def _that_differ(table: DataFrame) -> list[str]:
    """Return the other settings that change, or differ between arms.

    A micro-batch that is the whole batch is no setting of its own.
    """
    there = [name for name in _IF_THEY_DIFFER if name in table.columns]
    found = [name for name in there if table[name].dropna().nunique() > 1]
    whole = "microbatch" in found and (
        table["microbatch"].fillna(table["batch_size"]).eq(table["batch_size"]).all()
    )
    return [name for name in found if name != "microbatch" or not whole]


def _lines(table: DataFrame, settings: Sequence[str]) -> dict[str, list[str]]:
    """Return the first arm of each line, with all arms that share it."""
    columns = [*_AXES, *settings]
    sharing: dict[object, list[str]] = {}
    for arm, rows in table.groupby("arm", sort=False):
        key = rows[columns].astype(float).round(12).to_numpy().tobytes()
        sharing.setdefault(key, []).append(str(arm))
    return {arms[0]: arms for arms in sharing.values()}


def _line_styles(
    lines: Mapping[str, Sequence[str]], styles: Mapping[str, ArmStyle]
) -> dict[str, ArmStyle]:
    """Return a style per line, whose label says how many arms share it."""
    labels = {}
    for arm, arms in lines.items():
        more = f" and {len(arms) - 1} more" if len(arms) > 1 else ""
        labels[arm] = f"{styles[arm].label}{more}"
    return styles_of(labels)


def _draw(
    ax: Axes,
    table: DataFrame,
    axis: str,
    setting: str,
    styles: Mapping[str, ArmStyle],
) -> None:
    """Draw one setting of all lines; where lines coincide, all of them show."""
    named = len(styles) <= _MOST_NAMED
    for place, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        style = styles[str(arm)]
        ax.plot(
            rows[axis],
            rows[setting],
            color=style.color,
            linestyle=style.linestyle if named else "-",
            linewidth=max(1.0, 2.8 - 0.45 * place) if named else 0.8,
            marker=style.marker if len(rows) == 1 else "",
            alpha=1.0 if named else 0.7,
            zorder=2 + place / 100,
        )
    ax.set_xlim(left=0)


def _handle(style: ArmStyle) -> Line2D:
    return Line2D(
        [], [], color=style.color, linestyle=style.linestyle, label=style.label
    )


def _scale(ax: Axes, values: "pd.Series[float]") -> None:
    """Make a wide axis of positive values logarithmic; any other starts at zero."""
    known = values.dropna()
    positive = known[known > 0]
    # A cosine ends at zero, and its last rates say nothing on a log axis.
    if len(positive) == len(known) and positive.max() > _WIDE * positive.min():
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis)
        return
    top = float(known.max()) if len(known) else 1.0
    ax.set_ylim(0, 1.1 * top if top > 0 else 1.0)


def _caption(lines: Mapping[str, Sequence[str]], table: DataFrame) -> str:
    shared = sum(len(arms) > 1 for arms in lines.values())
    sentences = [
        "Settings of each arm as planned, against epochs and against updates, up to "
        "the longest run that the recipe allows."
    ]
    if shared:
        sentences.append("Arms with the same settings throughout share a line.")
    groups = table.groupby("arm", sort=False)
    alone = ", ".join(str(arm) for arm, rows in groups if len(rows) == 1)
    if alone:
        sentences.append(
            f"Points: only the first decision is known of {alone}, whose settings "
            "follow what is measured."
        )
    if len(lines) > _MOST_NAMED:
        sentences.append(f"{len(lines)} lines; the table names them.")
    return " ".join(sentences)
