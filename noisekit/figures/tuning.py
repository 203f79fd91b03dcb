"""The grid of learning rates from which each batch size's rate was chosen."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from pandas import DataFrame

from noisekit.core.errors import UsageError
from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, arm_handle, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    INK,
    ONE_COLUMN,
    ArmStyle,
    described,
    plain_log_ticks,
    styles_of,
)

_WIDE = 10.0
"""Ratio of largest to smallest value from which on the vertical axis is log."""


@figure_function
def rate_tuning(
    grid: DataFrame,
    *,
    chosen: Mapping[int, float],
    measured: str = "validation_error",
    name: str = "rate_tuning",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw an error against the learning rate for each batch size, choice marked.

    Runs that diverged have no error; they are drawn as crosses on the upper edge.

    Args:
        grid: Columns ``batch_size``, ``learning_rate``, ``seed`` and ``measured``,
            one row a run.
        chosen: The rate that was taken for each batch size.
        measured: What the choice was made on; never a test quantity.
        name: Stem of the files.
        ax: Axes of the user's to draw on; a new figure by default.

    Returns:
        The plot; its table has a row a run, with the ``mean`` over seeds of its batch
        size and rate (empty where one diverged) and whether that rate was ``chosen``.

    Raises:
        UsageError: If ``measured`` is a test quantity, or a chosen rate was not run.
    """
    columns = ["batch_size", "learning_rate", "seed", measured]
    summaries.require_columns(grid, columns, figure=name)
    if measured.startswith("test_"):
        raise UsageError(
            f"figure {name!r} needs a quantity of the validation or training set, got "
            f"{measured!r}; a rate chosen on test data makes the test unfair."
        )
    finite, diverged = summaries.drawable(
        grid, ["learning_rate", measured], figure=name, positive=["learning_rate"]
    )
    table = _tuning_table(grid[columns], measured, chosen, figure=name)
    sizes = sorted(set(grid["batch_size"]))
    styles = styles_of({str(size): f"batch {size:g}" for size in sizes})
    drawn_on = canvas(size=(ONE_COLUMN, 2.6), ax=ax)
    [panel] = drawn_on.axes
    for size, style in zip(sizes, styles.values(), strict=True):
        _draw_tuning(panel, table[table["batch_size"] == size], style)
    panel.set_xscale("log")
    panel.margins(x=0.06)
    values = finite[measured].to_numpy(dtype=float)
    if values.min() > 0 and values.max() > _WIDE * values.min():
        # A rate at the edge would press all others onto the lower edge.
        panel.set_yscale("log")
        plain_log_ticks(panel.yaxis)
    plain_log_ticks(panel.xaxis)
    panel.set_xlabel(described("learning_rate").axis_label)
    panel.set_ylabel(described(measured).axis_label)
    star = Line2D([], [], color=INK, marker="*", ls="none", ms=8, label="chosen rate")
    handles = [arm_handle(style) for style in styles.values()]
    drawn_on.legend([*handles, star])
    noun = "run" if diverged == 1 else "runs"
    crosses = f" Crosses at the top: {diverged} diverged {noun}." if diverged else ""
    caption = (
        f"{described(measured).label} against the learning rate for each batch size. "
        f"Small: each of {finite['seed'].nunique()} seeds; line: their mean; "
        f"star: the rate that was chosen.{crosses}"
    )
    return Plot(drawn_on.figure, table, name, caption)


def _tuning_table(
    grid: DataFrame, measured: str, chosen: Mapping[int, float], *, figure: str
) -> DataFrame:
    table = grid.rename(columns={measured: "value"}).assign(quantity=measured)
    by = ["batch_size", "learning_rate"]
    # A mean over the seeds that survived would flatter a rate that is too high.
    mean = table.groupby(by)["value"].transform(lambda v: v.mean(skipna=False))
    table["mean"] = mean.where(np.isfinite(mean))
    table["chosen"] = [
        bool(np.isclose(rate, chosen.get(int(size), np.nan)))
        for size, rate in table[by].itertuples(index=False)
    ]
    with_optimum = set(table.loc[table["chosen"], "batch_size"])
    for size, rate in chosen.items():
        if size not in with_optimum:
            raise UsageError(
                f"figure {figure!r} needs a run at the chosen rate {rate:g} of batch "
                f"size {size}, got none; add it to the grid."
            )
    return table.sort_values([*by, "seed"], ignore_index=True)


def _draw_tuning(ax: Axes, rows: DataFrame, style: ArmStyle) -> None:
    finite = np.isfinite(rows["value"])
    alive, dead = rows[finite], rows[~finite]
    ax.plot(
        alive["learning_rate"],
        alive["value"],
        style.marker,
        color=style.color,
        ms=2.5,
        alpha=0.5,
        mew=0,
    )
    mean = rows.dropna(subset="mean").drop_duplicates("learning_rate")
    ax.plot(
        mean["learning_rate"],
        mean["mean"],
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
    )
    best = mean[mean["chosen"]]
    ax.plot(
        best["learning_rate"],
        best["mean"],
        "*",
        color=style.color,
        mec=INK,
        mew=0.6,
        ms=10,
        zorder=4,
    )
    ax.plot(
        dead["learning_rate"],
        np.full(len(dead), 0.97),
        "x",
        color=style.color,
        ms=5,
        transform=ax.get_xaxis_transform(),
    )
