"""Arms side by side: every seed as a dot, and what is common to the seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError
from noisekit.figures import summaries
from noisekit.figures.canvas import (
    Canvas,
    UserAxes,
    arm_handle,
    canvas,
    figure_function,
)
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    MUTED,
    ONE_COLUMN,
    TWO_COLUMNS,
    ArmStyle,
    arm_styles,
    described,
    plain_log_ticks,
    snapshot_words,
    two_line_label,
)

_JOINED = ", joined across arms (same initial weights)"


@figure_function
def paired_arms(
    frame: DataFrame,
    measured: str,
    *,
    snapshots: Sequence[str],
    arms: Sequence[str] | None = None,
    scale: Literal["log", "linear"] = "log",
    variant: str | None = None,
    styles: Mapping[str, ArmStyle] | None = None,
    name: str = "paired_arms",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw one quantity per arm: every seed, and the mean with its interval beside.

    Where there are two arms, a line joins the seeds, which share initial weights.

    Args:
        frame: Measurements (long) or snapshots (wide), with ``arm``, ``seed`` and
            ``snapshot``.
        measured: Name from the vocabulary, or a column of your own.
        snapshots: One panel each, in this order.
        arms: Which, from left to right; by default all, as styled.
        scale: ``"log"`` for sharpness: the mean is then geometric.
        variant: Which setting of the measure, the first in the table by default.
        styles: From ``arm_styles``; made from the table by default.
        name: Stem of the files.
        ax: Axes of the user's to draw on, one per snapshot; a new figure by default.

    Returns:
        The plot; its table has a row for each seed's value (``kind`` is ``seed``)
        and each arm's mean (``kind`` is ``mean``, with ``low`` and ``high``).

    Raises:
        EmptyDataError: If an arm or a snapshot has nothing to draw.
    """
    styles = styles or arm_styles(frame)
    order = list(arms) if arms else [a for a in styles if a in set(frame["arm"])]
    log = scale == "log"
    rows = summaries.quantity_values(
        frame, measured, snapshots=snapshots, variant=variant, figure=name
    )
    rows = rows[rows["arm"].isin(order)]
    seeds, dropped = summaries.drawable(
        rows, ["value"], figure=name, positive=["value"] if log else []
    )
    shown = summaries.shown_seeds(seeds)
    means = _arm_means(seeds, order, snapshots, log=log, figure=name)
    width = ONE_COLUMN if len(snapshots) == 1 else TWO_COLUMNS
    drawn_on = canvas(1, len(snapshots), size=(width, 2.7), ax=ax, share_y=True)
    [row] = drawn_on.rows
    for panel, snapshot in zip(row, snapshots, strict=True):
        panel.set_yscale(scale)
        panel.set_title(snapshot_words(snapshot).capitalize())
        _draw_seeds(panel, shown[shown["snapshot"] == snapshot], order, styles)
        _draw_means(panel, means[means["snapshot"] == snapshot], order, styles)
    _name_arms(drawn_on, [styles[arm] for arm in order])
    row[0].set_ylabel(two_line_label(measured))
    if log:
        plain_log_ticks(row[0].yaxis)
    drawn_on.name_panels()
    table = pd.concat(
        [seeds.assign(kind="seed"), means.assign(kind="mean")], ignore_index=True
    ).assign(quantity=measured)
    mean = "geometric mean" if log else "mean"
    setting = f" ({seeds['variant'].iloc[0]})" if seeds["variant"].iloc[0] else ""
    caption = (
        f"{described(measured).label}{setting} at "
        f"{', '.join(map(snapshot_words, snapshots))}. Small: each seed"
        f"{_JOINED if len(order) == 2 else ''}; large: {mean} over seeds with its 95 % "
        f"t-interval.{summaries.shown_words(seeds)}{summaries.left_out(dropped)}"
    )
    types = {"seed": "Int64", "num_seeds": "Int64"}
    return Plot(drawn_on.figure, table.astype(types), name, caption)


def _name_arms(drawn_on: Canvas, drawn: Sequence[ArmStyle]) -> None:
    """Write the arms below the panels, or in a legend where there is no room."""
    places = range(len(drawn))
    labels = [style.label.replace(", ", ",\n") for style in drawn]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    width = drawn_on.figure.get_figwidth() - 0.7
    if 0.06 * longest > width / len(drawn_on.axes) / len(drawn):  # inches of a letter
        drawn_on.legend([arm_handle(style, line=False) for style in drawn])
        labels = [""] * len(drawn)
    for ax in drawn_on.axes:
        ax.set_xticks(places, labels)
        ax.tick_params(axis="x", length=0)
        ax.set_xlim(-0.45, len(drawn) - 0.55)
        ax.grid(visible=False, axis="x")


def _arm_means(
    seeds: DataFrame,
    arms: Sequence[str],
    snapshots: Sequence[str],
    *,
    log: bool,
    figure: str,
) -> DataFrame:
    means = []
    for snapshot in snapshots:
        for arm in arms:
            here = (seeds["snapshot"] == snapshot) & (seeds["arm"] == arm)
            values = seeds.loc[here, "value"].to_numpy(dtype=float)
            if not len(values):
                raise EmptyDataError(
                    f"figure {figure!r} needs a value of arm {arm!r} at snapshot "
                    f"{snapshot!r}, got none that can be drawn; leave the arm or the "
                    "snapshot out."
                )
            result = summaries.mean_interval(values, log=log)
            means.append({"arm": arm, "snapshot": snapshot, **result})
    return DataFrame(means)


def _draw_seeds(
    ax: Axes,
    seeds: DataFrame,
    arms: Sequence[str],
    styles: Mapping[str, ArmStyle],
) -> None:
    """Draw each seed; a line joins two arms, and would mean nothing across more."""
    place = {arm: i for i, arm in enumerate(arms)}
    for _, seed in seeds.groupby("seed") if len(arms) == 2 else ():
        seed = seed.assign(x=seed["arm"].map(place)).sort_values("x")
        ax.plot(seed["x"] - 0.1, seed["value"], color=MUTED, lw=0.4, alpha=0.6)
    for arm in arms:
        own = seeds[seeds["arm"] == arm]
        style = styles[arm]
        ax.plot(
            [place[arm] - 0.1] * len(own),
            own["value"],
            style.marker,
            color=style.color,
            ms=3,
            alpha=0.7,
            mew=0,
        )


def _draw_means(
    ax: Axes,
    means: DataFrame,
    arms: Sequence[str],
    styles: Mapping[str, ArmStyle],
) -> None:
    for i, arm in enumerate(arms):
        [row] = means[means["arm"] == arm].to_dict("records")
        style, x = styles[arm], i + 0.18
        if math.isfinite(row["low"]):
            ends = [row["low"], row["high"]]
            ax.plot([x, x], ends, "_-", color=style.color, lw=1.2, ms=5, mew=1.2)
        ax.plot(x, row["value"], style.marker, color=style.color, ms=4.5)
