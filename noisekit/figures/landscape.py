"""The loss along a line between two solutions."""

from collections.abc import Mapping
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from pandas import DataFrame

from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    INK,
    ONE_COLUMN,
    LineStyle,
    plain_log_ticks,
    styles_of,
)

_SPLIT_LINES: Mapping[str, LineStyle] = {
    "train": "-",
    "validation": (0, (1.2, 1.2)),
    "test": (0, (4, 1.5)),
    "": "-",
}


@figure_function
def linear_path(
    paths: DataFrame,
    *,
    start_label: str = "start",
    end_label: str = "end",
    loss_scale: Literal["log", "linear"] = "log",
    name: str = "linear_path",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw loss and accuracy along the line from one solution to another.

    Loss on the left axis, accuracy on the right; training data solid, test data
    dashed. Thin lines are seeds, thick ones their median. How wide a valley looks
    depends on the scale of the weights, which a line does not show.

    Args:
        paths: Columns ``alpha``, ``loss`` and ``error`` (fraction), as
            ``interpolate(...).frame()`` has them, and ``seed`` and ``split`` where
            there are several.
        start_label: Name of the solution at alpha 0.
        end_label: Name of the solution at alpha 1.
        loss_scale: Scale of the left axis.
        name: Stem of the files.
        ax: Axes of the user's to draw on; a new figure by default.

    Returns:
        The plot; its table has a row for each seed's point, with ``accuracy`` [%].

    Source:
        Keskar et al. 2017, arXiv:1609.04836, figure 3.
    """
    paths = summaries.with_runs(paths)
    columns = ["seed", "split", "alpha", "loss", "error"]
    summaries.require_columns(paths, columns, figure=name)
    positive = ["loss"] if loss_scale == "log" else []
    table, dropped = summaries.drawable(
        paths[columns], ["alpha", "loss", "error"], figure=name, positive=positive
    )
    table["accuracy"] = 100 * (1 - table["error"])
    drawn_on = canvas(size=(ONE_COLUMN, 2.7), ax=ax)
    [left] = drawn_on.axes
    right = left.twinx()
    loss, accuracy = styles_of({"loss": "", "accuracy": ""}).values()
    splits = [split for split in _SPLIT_LINES if split in set(table["split"])]
    for split in splits:
        rows = table[table["split"] == split]
        _draw_path(left, rows, "loss", loss.color)
        _draw_path(right, rows, "accuracy", accuracy.color)
    _dress(left, right, (loss.color, accuracy.color), loss_scale)
    left.xaxis.set_major_formatter("{x:g}")
    low, high = table["alpha"].min(), table["alpha"].max()
    for alpha, label in ((0.0, start_label), (1.0, end_label)):
        if low <= alpha <= high:
            left.axvline(alpha, color=INK, lw=0.6, ls=(0, (1, 2)), zorder=1)
            left.annotate(
                label.replace(", ", ",\n"),
                (alpha, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontweight="bold",
            )
    drawn_on.legend(
        [
            Line2D([], [], color=INK, ls=_SPLIT_LINES[s], label=f"{s} data")
            for s in splits
            if s
        ]
    )
    caption = (
        f"Cross-entropy (left axis) and accuracy (right axis) along the line from "
        f"{start_label} (α = 0) to {end_label} (α = 1). Thin: each of "
        f"{table['seed'].nunique()} pairs of seeds; thick: their median."
        f"{summaries.left_out(dropped, 'points')}"
    )
    return Plot(drawn_on.figure, table.reset_index(drop=True), name, caption)


def _draw_path(ax: Axes, rows: DataFrame, column: str, color: str) -> None:
    line = _SPLIT_LINES[str(rows["split"].iloc[0])]
    for _, seed in rows.groupby("seed"):
        seed = seed.sort_values("alpha")
        ax.plot(seed["alpha"], seed[column], color=color, lw=0.4, ls=line, alpha=0.35)
    median = rows.groupby("alpha", sort=True)[column].median()
    ax.plot(median.index, median.to_numpy(), color=color, ls=line)


def _dress(left: Axes, right: Axes, colors: tuple[str, str], loss_scale: str) -> None:
    left.set_yscale(loss_scale)
    if loss_scale == "log":
        plain_log_ticks(left.yaxis)
    left.set_xlabel(r"Position $\alpha$ along the line")
    left.set_ylabel("Cross-entropy loss")
    right.set_ylabel("Accuracy [%]")
    right.set_ylim(0, 102)
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    for ax, color, side in ((left, colors[0], "left"), (right, colors[1], "right")):
        ax.yaxis.label.set_color(color)
        ax.tick_params(axis="y", which="both", colors=color)
        ax.spines[side].set_color(color)
