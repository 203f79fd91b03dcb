"""How per-example gradient norms are distributed."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError
from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, arm_handle, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    ONE_COLUMN,
    TWO_COLUMNS,
    ZONE,
    ArmStyle,
    arm_styles,
    log_limits,
    snapshot_words,
    two_line_label,
)

_ROUNDED = 2.0**-48
"""Squared step of a single-precision probability near 1, which is 2⁻²⁴."""
_ROUNDING_WORDS = (
    " Shaded: below 2⁻⁴⁸ of the largest norm, where single precision rounds "
    "probabilities near 1 and the distribution has steps that training did not make."
)


@figure_function
def example_norm_histograms(
    examples: DataFrame,
    *,
    snapshots: Sequence[str],
    num_bins: int = 40,
    styles: Mapping[str, ArmStyle] | None = None,
    name: str = "example_norm_histograms",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw how squared per-example gradient norms are distributed, per arm.

    One panel a snapshot, all seeds of an arm pooled, bins of equal width on a log
    axis. A triangle on the upper edge marks the median.

    Args:
        examples: Columns ``arm``, ``snapshot`` and ``example_grad_sq_norm``.
        snapshots: Which, from left to right.
        num_bins: Bins over the range of all panels.
        styles: From ``arm_styles``; made from the table by default.
        name: Stem of the files.
        ax: Axes of the user's to draw on, one per snapshot; a new figure by default.

    Returns:
        The plot; its table has a row a bin, with the arm's ``median`` there.

    Raises:
        EmptyDataError: If a snapshot has no value.
    """
    measured = "example_grad_sq_norm"
    columns = ["arm", "snapshot", measured]
    summaries.require_columns(examples, columns, figure=name)
    asked = examples[examples["snapshot"].isin(snapshots)]
    values = _finite_at(examples, snapshots, figure=name)
    positive, off_axis = summaries.drawable(
        values, [measured], figure=name, positive=[measured]
    )
    edges = np.geomspace(*log_limits(positive[measured], pad=1.01), num_bins + 1)
    styles = styles or arm_styles(examples)
    table = _histograms(values, snapshots, edges)
    width = ONE_COLUMN if len(snapshots) == 1 else TWO_COLUMNS
    drawn_on = canvas(1, len(snapshots), size=(width, 2.4), ax=ax, share_y=True)
    row = drawn_on.axes
    rounded = _ROUNDED * float(positive[measured].max())
    for panel, snapshot in zip(row, snapshots, strict=True):
        panel.set_xscale("log")
        panel.set_title(snapshot_words(snapshot).capitalize())
        panel.set_xlabel(two_line_label("example_grad_sq_norm"))
        if edges[0] < rounded:
            panel.axvspan(edges[0], rounded, color=ZONE, lw=0, zorder=0)
        _draw_histograms(panel, table[table["snapshot"] == snapshot], styles)
    row[0].set_ylabel("Share of examples per bin")
    row[0].set_ylim(bottom=0)
    drawn_on.name_panels()
    drawn = [arm for arm in styles if arm in set(table["arm"])]
    handles = [arm_handle(styles[arm]) for arm in drawn]
    for handle in handles:
        handle.set_marker("none")
    drawn_on.legend(handles)
    caption = (
        "Squared per-example gradient norms, seeds pooled, bins of equal width on a "
        f"log axis; triangles mark medians.{_off_axis_words(off_axis)}"
        f"{_ROUNDING_WORDS if edges[0] < rounded else ''}"
        f"{summaries.left_out(len(asked) - len(values))}"
    )
    return Plot(drawn_on.figure, table, name, caption)


def _off_axis_words(count: int) -> str:
    if not count:
        return ""
    noun = "norm of zero has" if count == 1 else "norms of zero have"
    return f" {count} {noun} no place on the axis; shares and medians count them."


def _finite_at(
    examples: DataFrame, snapshots: Sequence[str], *, figure: str
) -> DataFrame:
    """Return the finite values at the snapshots, each of which must have some."""
    finite = examples[np.isfinite(examples["example_grad_sq_norm"].astype(float))]
    known = set(finite["snapshot"])
    absent = [snapshot for snapshot in snapshots if snapshot not in known]
    if absent:
        raise EmptyDataError(
            f"figure {figure!r} needs per-example gradient norms at the snapshots "
            f"{', '.join(snapshots)}, got none at {', '.join(absent)} (there are some "
            f"at: {', '.join(sorted(known)) or 'none'}); measure them there or name "
            "others."
        )
    return finite[finite["snapshot"].isin(snapshots)]


def _histograms(
    values: DataFrame, snapshots: Sequence[str], edges: NDArray[np.float64]
) -> DataFrame:
    tables = []
    for snapshot in snapshots:
        here = values[values["snapshot"] == snapshot]
        for arm, norms in here.groupby("arm", sort=False)["example_grad_sq_norm"]:
            counts, _ = np.histogram(norms, bins=edges)
            bins = {"left": edges[:-1], "right": edges[1:], "count": counts}
            tables.append(
                DataFrame(bins).assign(
                    share=counts / len(norms),
                    median=float(norms.median()),
                    arm=arm,
                    snapshot=snapshot,
                )
            )
    columns = ["snapshot", "arm", "left", "right", "count", "share", "median"]
    return pd.concat(tables, ignore_index=True)[columns]


def _draw_histograms(
    ax: Axes, table: DataFrame, styles: Mapping[str, ArmStyle]
) -> None:
    for arm, rows in table.groupby("arm", sort=False):
        style = styles[str(arm)]
        edges = [*rows["left"], rows["right"].iloc[-1]]
        ax.stairs(rows["share"], edges, color=style.color, ls=style.linestyle, lw=1.1)
        ax.plot(
            rows["median"].iloc[0],
            0.98,
            "v",
            color=style.color,
            ms=5,
            mec="white",
            mew=0.5,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
        )
