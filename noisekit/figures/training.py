"""Learning curves."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError
from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, arm_handle, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    ONE_COLUMN,
    TWO_COLUMNS,
    ArmStyle,
    arm_styles,
    described,
    plain_log_ticks,
    two_line_label,
)

CURVES = ("train_loss", "validation_loss", "test_error")
"""What ``training_curves`` draws by default, where it was recorded."""

_SEED_POINTS, _MEAN_POINTS = 48, 96
"""Most points of one line; more are not distinguishable at the printed size."""

Axis = Literal["epoch", "step", "examples_seen"]
_AXES: tuple[Axis, ...] = ("epoch", "step")


@figure_function
def training_curves(
    evaluations: DataFrame,
    *,
    quantities: Sequence[str] | None = None,
    against: Sequence[Axis] | None = None,
    styles: Mapping[str, ArmStyle] | None = None,
    name: str = "training_curves",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw losses and errors against epochs and against updates, all seeds shown.

    One row a quantity, one column an axis: at equal epochs and at equal updates
    different arms may lead. A column ends where the first arm ends, unless that
    hides part of an arm from every column. Losses are drawn and averaged on a log
    scale. A mean is drawn only where all seeds of the arm have a value.

    Args:
        evaluations: The axes and the quantities, and ``arm`` and ``seed`` where there
            are several.
        quantities: Names from the vocabulary, or columns of your own; by default
            those of ``CURVES`` that the table holds.
        against: Columns for the horizontal axes; by default epochs and updates, as
            far as the table has them.
        styles: From ``arm_styles``; made from the table by default.
        name: Stem of the files.
        ax: Axes of the user's to draw on, one per panel; a new figure by default.

    Returns:
        The plot; its table has a row for each seed's evaluation (``kind`` is
        ``seed``) and each mean (``kind`` is ``mean``, with ``low`` and ``high``).
        Long lines are thinned to what print can show; the table is whole.

    Raises:
        EmptyDataError: If a quantity has no finite value.
    """
    evaluations = summaries.with_runs(evaluations)
    names = list(quantities) if quantities else _recorded(evaluations, name)
    against = against or [axis for axis in _AXES if axis in evaluations.columns]
    summaries.require_columns(
        evaluations, ["arm", "seed", *against, *names], figure=name
    )
    styles = styles or arm_styles(evaluations)
    drawn_on = canvas(
        len(names),
        len(against),
        ax=ax,
        size=(
            ONE_COLUMN if len(against) == 1 else TWO_COLUMNS,
            0.6 + 1.55 * len(names) if len(names) > 1 else 2.5,
        ),
        share_x="col",
        share_y="row",
    )
    grid = drawn_on.rows
    ends, is_cut = _column_ends(evaluations, against)
    tables, dropped = [], 0
    for row, curve in zip(grid, names, strict=True):
        table, missing = _curve_table(evaluations, against, curve, figure=name)
        for panel, axis in zip(row, against, strict=True):
            _scale_curve_axis(panel, table, curve)
            _draw_curves(panel, table[table[axis] <= ends[axis]], axis, styles)
            _start_at_zero(panel)
        row[0].set_ylabel(two_line_label(curve))
        if row[0].get_yscale() == "log":
            plain_log_ticks(row[0].yaxis)
        tables.append(table)
        dropped += missing
    for panel, axis in zip(grid[-1], against, strict=True):
        panel.margins(x=0.03)
        panel.set_xlabel(described(axis).axis_label)
    drawn_on.figure.align_ylabels([row[0] for row in grid])
    drawn_on.name_panels()
    drawn = [styles[arm] for arm in styles if arm in set(evaluations["arm"])]
    drawn_on.legend([arm_handle(style) for style in drawn])
    caption = _curves_caption(names, against, is_cut=is_cut)
    table = pd.concat(tables, ignore_index=True)
    caption += summaries.shown_words(evaluations) + summaries.left_out(dropped)
    return Plot(drawn_on.figure, table, name, caption)


def _curves_caption(
    names: Sequence[str], against: Sequence[str], *, is_cut: bool
) -> str:
    first, *rest = (described(name).label for name in names)
    labels = ", ".join([first, *(label[:1].lower() + label[1:] for label in rest)])
    words = {"epoch": "epochs", "step": "updates", "examples_seen": "examples seen"}
    cut = " A column ends where its first arm ends." if is_cut else ""
    return (
        f"{labels} against "
        f"{' and against '.join(words.get(a, a) for a in against)}. Thick: mean over "
        "seeds, band: its 95 % t-interval; thin: each seed. A mean ends where the "
        f"first of its seeds ends.{cut} Lines are drawn through at most {_SEED_POINTS} "
        f"(seeds) or {_MEAN_POINTS} (means) evaluations; the table has all of them."
    )


def _column_ends(
    evaluations: DataFrame, against: Sequence[str]
) -> tuple[dict[str, float], bool]:
    """Return where each column ends, and whether that cuts an arm off."""
    reached = evaluations.groupby("arm")[list(against)].max()
    cut = reached > 1.02 * reached.min()
    shown_elsewhere = bool((~cut).any(axis=1).all())
    ends = reached.min() if shown_elsewhere else reached.max()
    limits = {str(axis): float(end) for axis, end in ends.items()}
    return limits, shown_elsewhere and bool(cut.any(axis=None))


def _recorded(evaluations: DataFrame, figure: str) -> list[str]:
    names = [
        curve
        for curve in CURVES
        if curve in evaluations.columns and evaluations[curve].notna().any()
    ]
    if not names:
        raise EmptyDataError(
            f"figure {figure!r} needs one of {', '.join(CURVES)} with a value, got a "
            f"table with {', '.join(map(str, evaluations.columns))}; evaluate during "
            "training (the recipe's [evaluation])."
        )
    return names


def _curve_table(
    evaluations: DataFrame, against: Sequence[str], curve: str, *, figure: str
) -> tuple[DataFrame, int]:
    log = curve.endswith("_loss")
    values, dropped = summaries.drawable(
        evaluations, [*against, curve], figure=figure, positive=[curve] if log else []
    )
    seeds = values[["arm", "seed", *against, curve]].rename(columns={curve: "value"})
    means = [
        summaries.mean_curve(rows, at=against, log=log).assign(arm=arm)
        for arm, rows in seeds.groupby("arm", sort=False)
    ]
    table = pd.concat(
        [seeds.assign(kind="seed"), *(m.assign(kind="mean") for m in means)],
        ignore_index=True,
    )
    columns = ["kind", "arm", "seed", *against, "value", "low", "high", "num_seeds"]
    table = table[columns].astype({"seed": "Int64", "num_seeds": "Int64"})
    table.insert(0, "quantity", curve)
    return table, dropped


def _draw_curves(
    ax: Axes, table: DataFrame, axis: str, styles: Mapping[str, ArmStyle]
) -> None:
    for i, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        style = styles[str(arm)]
        seeds = summaries.shown_seeds(rows[rows["kind"] == "seed"])
        lines = [
            _thinned(seed.sort_values(axis), _SEED_POINTS)[[axis, "value"]].to_numpy()
            for _, seed in seeds[["seed", axis, "value"]].groupby("seed")
        ]
        ax.add_collection(
            LineCollection(lines, colors=style.color, linewidths=0.4, alpha=0.4)
        )
        mean = _thinned(rows[rows["kind"] == "mean"], _MEAN_POINTS)
        ax.fill_between(
            mean[axis], mean["low"], mean["high"], color=style.color, alpha=0.2, lw=0
        )
        ax.plot(
            mean[axis],
            mean["value"],
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker,
            # Shifted from arm to arm, so that curves that coincide still show.
            markevery=(i * len(mean) // 24, max(1, len(mean) // 6)),
            markersize=3.5,
        )


def _thinned(rows: DataFrame, most: int) -> DataFrame:
    """Return evenly spaced rows, first and last among them."""
    if len(rows) <= most:
        return rows
    return rows.iloc[np.linspace(0, len(rows) - 1, most).round().astype(int)]


def _scale_curve_axis(ax: Axes, table: DataFrame, curve: str) -> None:
    values = table.loc[table["kind"] == "seed", "value"].to_numpy(dtype=float)
    positive = values[values > 0]
    spans = len(positive) > 0 and positive.max() / positive.min() > 20
    if curve.endswith("_loss") or (spans and len(positive) == len(values)):
        ax.set_yscale("log")
    elif spans and len(positive) + int((values == 0).sum()) == len(values):
        _scale_down_to_zero(ax, positive)


def _start_at_zero(ax: Axes) -> None:
    """Let a linear axis begin at zero where nothing lies below; after drawing only.

    Before drawing, fixing the lower end would fix the upper one at 1.
    """
    if ax.get_yscale() == "linear" and ax.dataLim.y0 >= 0:
        ax.set_ylim(bottom=0)


def _scale_down_to_zero(ax: Axes, positive: NDArray[np.float64]) -> None:
    """Make an axis logarithmic above the smallest error, with a place for zero."""
    threshold = float(positive.min())
    ax.set_yscale("symlog", linthresh=threshold, linscale=0.4)
    decades = 10.0 ** np.arange(-6, 1)
    ticks = [0.0, *(d for d in decades if d > 0.99 * threshold)]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0, float(positive.max()) * 1.3)
