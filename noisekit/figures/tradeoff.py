"""Steps against examples over batch sizes, as the noise scale predicts them."""

import math

import numpy as np
from matplotlib.lines import Line2D
from pandas import DataFrame

from noisekit.core.errors import UsageError
from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, arm_handle, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    INK,
    MUTED,
    ONE_COLUMN,
    described,
    log_limits,
    plain_log_ticks,
    styles_of,
)

_LABELS = {"steps": "steps", "examples": "examples"}
_ENDS = ("_low", "_high")


@figure_function
def batch_size_tradeoff(
    table: DataFrame,
    *,
    name: str = "batch_size_tradeoff",
    ax: UserAxes | None = None,
) -> Plot:
    r"""Draw steps and examples against batch size, relative to the fewest of each.

    .. math:: S / S_{min} = 1 + B_{noise} / B, \quad E / E_{min} = 1 + B / B_{noise}

    The lines cross at the noise scale, where both are 2. Bands are from the interval of
    the noise scale; where that has no upper end, the band of the steps goes on upwards.

    Args:
        table: From ``probe.advise().table()``: columns ``batch_size``, ``present``,
            ``steps`` and ``examples``, and the two with ``_low`` and ``_high``.
        name: Stem of the files.
        ax: Axes of the user's to draw on; a new figure by default.

    Returns:
        The plot; its table has the columns ``batch_size``, ``quantity``, ``value``,
        ``low``, ``high`` and ``present``.

    Raises:
        UsageError: If columns are missing, or no band has a finite end.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, section 2.3.
    """
    ends = [f"{quantity}{end}" for quantity in _LABELS for end in _ENDS]
    summaries.require_columns(
        table, ["batch_size", "present", *_LABELS, *ends], figure=name
    )
    rows = table.sort_values("batch_size", ignore_index=True)
    if not np.isfinite(rows[ends].to_numpy(dtype=float)).any():
        raise UsageError(
            f"figure {name!r} needs a noise scale that readings bound at one side at "
            "least, got none; take more readings."
        )
    drawn = _drawn_table(rows)
    drawn_on = canvas(size=(ONE_COLUMN, 2.6), ax=ax)
    [panel] = drawn_on.axes
    panel.set(xscale="log", yscale="log")
    shown = drawn["value"].where(drawn["value"].notna(), drawn["low"])
    top = log_limits(shown[np.isfinite(shown)])[1]
    panel.set_ylim(0.9, max(4.0, top))
    styles = styles_of(_LABELS)
    for quantity, style in styles.items():
        own = drawn[drawn["quantity"] == quantity]
        panel.fill_between(
            own["batch_size"],
            own["low"].clip(lower=0.9),
            own["high"].clip(upper=2 * max(4.0, top)),
            color=style.color,
            alpha=0.2,
            lw=0,
        )
        panel.plot(
            own["batch_size"],
            own["value"],
            color=style.color,
            marker=style.marker,
            linestyle=style.linestyle,
        )
    panel.axhline(2.0, color=MUTED, lw=0.8, ls=(0, (1.2, 1.2)))
    handles = [arm_handle(style) for style in styles.values()]
    present = rows.loc[rows["present"].astype(bool), "batch_size"]
    if len(present):
        size = float(present.iloc[0])
        panel.axvline(size, color=INK, lw=0.8, ls=(0, (5, 1.5)))
        handles.append(
            Line2D([], [], color=INK, lw=0.8, ls=(0, (5, 1.5)), label="present batch")
        )
    plain_log_ticks(panel.xaxis)
    plain_log_ticks(panel.yaxis)
    panel.set_xlabel(described("batch_size").axis_label)
    panel.set_ylabel("Relative to the fewest")
    drawn_on.legend(handles)
    unbounded = not np.isfinite(rows["steps_high"].to_numpy(dtype=float)).all()
    without = " The noise scale has no upper bound." if unbounded else ""
    caption = (
        "Steps and examples to the same loss against batch size, relative to the "
        "fewest of each, as the simple noise scale predicts them for the best learning "
        f"rate at each size. Bands: 95 % interval of the noise scale.{without}"
    )
    return Plot(drawn_on.figure, drawn, name, caption)


def _drawn_table(rows: DataFrame) -> DataFrame:
    """One row a size and quantity."""
    parts = [
        {
            "batch_size": row["batch_size"],
            "quantity": quantity,
            "value": row[quantity],
            "low": row[f"{quantity}_low"],
            "high": row[f"{quantity}_high"],
            "present": bool(row["present"]),
        }
        for quantity in _LABELS
        for row in rows.to_dict("records")
    ]
    return DataFrame(parts).replace([-math.inf], math.nan)
