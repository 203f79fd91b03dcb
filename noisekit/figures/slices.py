"""The loss around a solution: on a plane, and along lines."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame

from noisekit.core.errors import UsageError
from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, arm_handle, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    INK,
    ONE_COLUMN,
    ZONE,
    ArmStyle,
    plain_log_ticks,
    styles_of,
)

LossScale = Literal["log", "linear"]

_COLORMAP = "cividis"  # even in lightness, and made for colour-blind eyes
_NUM_FILLED = 24
_NUM_LINES = 7
_LIGHT = 0.6


@figure_function
def loss_surface(
    slices: DataFrame,
    *,
    loss_scale: LossScale = "log",
    levels: Sequence[float] | None = None,
    axis_labels: tuple[str, str] = ("First direction", "Second direction"),
    what: str = "",
    name: str = "loss_surface",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw the loss on a plane through a solution, as filled contours.

    Dark is low. The cross is the solution itself; grey is where the loss is not
    finite, or not positive on a log scale. How wide a basin looks depends on how the
    directions were scaled, so say it in ``what``.

    Args:
        slices: Columns ``first``, ``second`` and ``loss``, one row for each point of
            a grid.
        loss_scale: Whether colours and levels are even in the logarithm of the loss.
        levels: Losses at which lines are drawn; by default about seven round ones.
        axis_labels: What the two axes are.
        what: A sentence for the caption, such as how the directions were scaled.
        name: Stem of the files.
        ax: Axes of the user's to draw on; a new figure by default.

    Returns:
        The plot; its table has the grid's points that could be drawn.

    Raises:
        UsageError: If the points are no grid, the loss is the same everywhere, or
            levels do not increase.

    Source:
        Li et al. 2018, arXiv:1712.09913, figure 5.
    """
    columns = ["first", "second", "loss"]
    summaries.require_columns(slices, columns, figure=name)
    positive = ["loss"] if loss_scale == "log" else []
    table, dropped = summaries.drawable(
        slices[columns], columns, figure=name, positive=positive
    )
    grid = _gridded(slices, table, figure=name)
    low, high = float(table["loss"].min()), float(table["loss"].max())
    lines = _levels(low, high, loss_scale, levels, figure=name)
    drawn_on = canvas(size=(ONE_COLUMN, 2.6), ax=ax)
    [panel] = drawn_on.axes
    panel.set_facecolor(ZONE)
    shades = LogNorm(low, high) if loss_scale == "log" else Normalize(low, high)
    drawn = _fill(panel, grid, _even(low, high, _NUM_FILLED, loss_scale), shades)
    _draw_lines(panel, grid, lines, shades)
    panel.plot(0, 0, "+", color="white", ms=7, mew=1.4)
    bar = drawn_on.figure.colorbar(drawn, cax=panel.inset_axes((1.03, 0.0, 0.045, 1.0)))
    _dress_bar(bar, loss_scale)
    panel.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    panel.set_aspect("equal")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter("{x:g}")
    panel.grid(visible=False)
    remark = f" {what.rstrip('.')}." if what else ""
    at = ", ".join(f"{level:.3g}" for level in lines)
    caption = (
        f"Loss on a plane through the solution (cross), from {low:.3g} (dark) to "
        f"{high:.3g} (light); lines at {at}.{remark}"
        f"{summaries.left_out(dropped, 'points')}"
    )
    return Plot(drawn_on.figure, table.reset_index(drop=True), name, caption)


@figure_function
def loss_lines(
    slices: DataFrame,
    *,
    loss_scale: LossScale = "log",
    labels: Mapping[str, str] | None = None,
    axis_label: str = "Step along the direction",
    what: str = "",
    name: str = "loss_lines",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw the loss along a line through one or several solutions.

    Args:
        slices: Columns ``first``, ``loss`` and, where there are several lines,
            ``label``; lines of one label are drawn alike.
        loss_scale: Scale of the loss axis.
        labels: Words for the labels, in the order of the legend.
        axis_label: What the axis is.
        what: A sentence for the caption, such as how the direction was scaled.
        name: Stem of the files.
        ax: Axes of the user's to draw on; a new figure by default.

    Returns:
        The plot; its table has the points that could be drawn.

    Source:
        Li et al. 2018, arXiv:1712.09913, figure 2.
    """
    given = slices if "label" in slices.columns else slices.assign(label="loss")
    columns = ["label", "first", "loss"]
    summaries.require_columns(given, columns, figure=name)
    positive = ["loss"] if loss_scale == "log" else []
    table, dropped = summaries.drawable(
        given[columns], ["first", "loss"], figure=name, positive=positive
    )
    names = [str(label) for label in table["label"].drop_duplicates()]
    words = labels or {}
    ordered = [key for key in words if key in names]
    ordered += [key for key in names if key not in words]
    styles = styles_of({key: words.get(key, key) for key in ordered})
    drawn_on = canvas(size=(ONE_COLUMN, 2.4), ax=ax)
    [panel] = drawn_on.axes
    for key, style in styles.items():
        _draw_line(panel, table[table["label"] == key], style)
    panel.axvline(0.0, color=INK, lw=0.6, ls=(0, (1, 2)), zorder=1)
    panel.set_yscale(loss_scale)
    if loss_scale == "log":
        plain_log_ticks(panel.yaxis)
    panel.set(xlabel=axis_label, ylabel="Loss")
    panel.xaxis.set_major_formatter("{x:g}")
    if len(styles) > 1:
        drawn_on.legend([arm_handle(style) for style in styles.values()])
    remark = f" {what.rstrip('.')}." if what else ""
    caption = (
        "Loss along a line through the solution at 0 (dotted)."
        f"{remark}{summaries.left_out(dropped, 'points')}"
    )
    return Plot(drawn_on.figure, table.reset_index(drop=True), name, caption)


def _gridded(
    slices: DataFrame, table: DataFrame, *, figure: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both axes, and the losses with NaN where there is none, second axis first."""
    x = np.unique(slices["first"].to_numpy(dtype=float))
    y = np.unique(slices["second"].to_numpy(dtype=float))
    points = slices[["first", "second"]].drop_duplicates()
    whole = len(points) == len(slices) == len(x) * len(y)
    if min(len(x), len(y)) < 2 or not whole:
        raise UsageError(
            f"figure {figure!r} needs a grid of points, each once, got {len(slices)} "
            f"rows for {len(x)} x {len(y)} coordinates; pass one slice at a time."
        )
    losses = np.full((len(y), len(x)), math.nan)
    rows = np.searchsorted(y, table["second"].to_numpy(dtype=float))
    columns = np.searchsorted(x, table["first"].to_numpy(dtype=float))
    losses[rows, columns] = table["loss"].to_numpy(dtype=float)
    return x, y, losses


def _levels(
    low: float,
    high: float,
    scale: LossScale,
    levels: Sequence[float] | None,
    *,
    figure: str,
) -> list[float]:
    if not high > low:
        raise UsageError(
            f"figure {figure!r} needs a loss that varies over the plane, got {low:g} "
            "everywhere; widen the slice's extent."
        )
    if levels is None:
        return _round_levels(low, high, scale)
    chosen = [float(level) for level in levels]
    if not chosen or chosen != sorted(set(chosen)):
        raise UsageError(
            f"figure {figure!r} needs levels that increase, got {chosen or 'none'}."
        )
    return chosen


def _round_levels(low: float, high: float, scale: LossScale) -> list[float]:
    """About seven losses that read well: 1, 2, 5 of each decade, or whole steps."""
    if scale == "linear":
        values = list(MaxNLocator(_NUM_LINES).tick_values(low, high))
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    inside = [float(value) for value in values if low < value < high]
    step = math.ceil(len(inside) / _NUM_LINES)
    return inside[::step] or [(low * high) ** 0.5 if low > 0 else (low + high) / 2]


def _even(low: float, high: float, count: int, scale: LossScale) -> np.ndarray:
    space = np.geomspace if scale == "log" else np.linspace
    values = np.asarray(space(low, high, count))
    # Rounding must not put the lowest or highest point outside.
    values[[0, -1]] = low, high
    return values


def _fill(
    ax: Axes,
    grid: tuple[np.ndarray, np.ndarray, np.ndarray],
    levels: np.ndarray,
    shades: Normalize,
) -> QuadContourSet:
    x, y, losses = grid
    masked = np.ma.masked_invalid(losses)
    return ax.contourf(x, y, masked, levels=levels, norm=shades, cmap=_COLORMAP)


def _draw_lines(
    ax: Axes,
    grid: tuple[np.ndarray, np.ndarray, np.ndarray],
    levels: Sequence[float],
    norm: Normalize,
) -> None:
    x, y, losses = grid
    shown = [v for v in levels if np.nanmin(losses) < v < np.nanmax(losses)]
    if not shown:
        return
    # White shows on the dark half of the colours only.
    colors = ["white" if norm(value) < _LIGHT else INK for value in shown]
    masked = np.ma.masked_invalid(losses)
    lines = ax.contour(x, y, masked, levels=shown, colors=colors, linewidths=0.5)
    ax.clabel(lines, fmt=lambda value: f"{value:.3g}", fontsize=7)


def _dress_bar(bar: Colorbar, scale: LossScale) -> None:
    bar.set_label("Loss")
    bar.outline.set_visible(False)
    if scale == "log":
        plain_log_ticks(bar.ax.yaxis)
    else:
        low, high = bar.ax.get_ylim()
        ticks = MaxNLocator(6).tick_values(low, high)
        bar.set_ticks([tick for tick in ticks if low <= tick <= high])
        bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.grid(visible=False)


def _draw_line(ax: Axes, rows: DataFrame, style: ArmStyle) -> None:
    rows = rows.sort_values("first")
    ax.plot(
        rows["first"],
        rows["loss"],
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        ms=2.5,
        mec="white",
        mew=0.3,
    )
