"""One arm over another for several measures: paired ratios and their picture."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from pandas import DataFrame, Series

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    INK,
    TWO_COLUMNS,
    described,
    in_three_digits,
    log_limits,
    plain_log_ticks,
)


def paired_ratios(
    frame: DataFrame,
    *,
    quantities: Sequence[str],
    snapshot: str,
    treatment: str,
    reference: str,
    comparison: str,
) -> DataFrame:
    """Return treatment over reference for each quantity, paired by seed.

    The ratio is the exponential of the mean log ratio over seeds, with its 95 %
    t-interval. Of a quantity measured in several variants, the first is taken.

    Args:
        frame: Measurements (long) or snapshots (wide), with ``arm`` and ``seed``.
        quantities: Names from the vocabulary.
        snapshot: Where in training.
        treatment: Arm above the line.
        reference: Arm below the line.
        comparison: What the pair holds equal, in words; the panel's title.

    Returns:
        Columns ``comparison``, ``quantity``, ``variant``, ``snapshot``, ``ratio``,
        ``low``, ``high``, ``num_pairs`` and ``num_left_out``: pairs with a value
        that is missing, not finite or not positive.

    Raises:
        UsageError: If an arm has no value of a quantity.
    """
    rows = []
    for name in quantities:
        values = summaries.quantity_values(
            frame, name, snapshots=[snapshot], figure="descriptive_ratios"
        )
        ratios = _seed_ratios(values, treatment, reference, measured=name)
        usable = ratios[np.isfinite(ratios)]
        result = {"value": math.nan, "low": math.nan, "high": math.nan}
        if len(usable):
            result = summaries.mean_interval(usable.to_numpy(), log=True)
        rows.append(
            {
                "comparison": comparison,
                "quantity": name,
                "variant": values["variant"].iloc[0],
                "snapshot": snapshot,
                "ratio": result["value"],
                "low": result["low"],
                "high": result["high"],
                "num_pairs": len(usable),
                "num_left_out": len(ratios) - len(usable),
            }
        )
    return DataFrame(rows)


def _seed_ratios(
    values: DataFrame, treatment: str, reference: str, *, measured: str
) -> "Series[float]":
    by_seed = values.pivot(index="seed", columns="arm", values="value")
    missing = [arm for arm in (treatment, reference) if arm not in by_seed.columns]
    if missing:
        raise UsageError(
            f"paired ratios of {measured} need the arms {treatment!r} and "
            f"{reference!r}, got no value of {', '.join(missing)} (arms in the table: "
            f"{', '.join(map(str, by_seed.columns))}); name others."
        )
    above, below = by_seed[treatment], by_seed[reference]
    # A negative pair would give a positive ratio that means nothing.
    return (above.where(above > 0) / below.where(below > 0)).rename("ratio")


@figure_function
def descriptive_ratios(
    ratios: DataFrame,
    *,
    notes: Mapping[str, str] | None = None,
    name: str = "descriptive_ratios",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw one arm over the other for several measures, as a table with intervals.

    One row a measure, one panel a comparison. Nothing here is tested: the figure
    shows what else differs between the arms where one measure is compared.

    Args:
        ratios: From ``paired_ratios``, one or several comparisons stacked.
        notes: Quantity to a short remark below its name, such as the first-order
            share of epsilon-sharpness.
        name: Stem of the files.
        ax: Axes of the user's to draw on, one per comparison; a new figure by default.

    Returns:
        The plot; its table is ``ratios``.

    Raises:
        EmptyDataError: If a measure has no ratio in any comparison.
    """
    columns = ["comparison", "quantity", "ratio", "low", "high", "num_left_out"]
    summaries.require_columns(ratios, columns, figure=name)
    finite, _ = summaries.drawable(ratios, ["ratio"], figure=name, positive=["ratio"])
    names = list(dict.fromkeys(ratios["quantity"]))
    absent = [n for n in names if n not in set(finite["quantity"])]
    if absent:
        raise EmptyDataError(
            f"figure {name!r} needs a positive finite ratio of {', '.join(absent)} in "
            "some comparison, got none; leave these measures out."
        )
    comparisons = list(dict.fromkeys(ratios["comparison"]))
    size = (TWO_COLUMNS, 0.75 + 0.3 * len(names))
    drawn_on = canvas(1, len(comparisons), size=size, ax=ax, share_x=True, share_y=True)
    row = drawn_on.axes
    row[0].set_xscale("log")
    row[0].set_xlim(
        *log_limits([*ratios[["ratio", "low", "high"]].to_numpy(), [1.0] * 3])
    )
    for panel, comparison in zip(row, comparisons, strict=True):
        _draw_ratios(panel, ratios[ratios["comparison"] == comparison], names)
        title = comparison[:1].upper() + comparison[1:]
        panel.set_title(textwrap.fill(title, max(20, 88 // len(comparisons))))
    plain_log_ticks(row[0].xaxis)
    remarks = notes or {}
    labels = [_measure_label(n, remarks.get(n, "")) for n in names]
    row[0].set_yticks(range(len(names)), labels)
    row[0].set_ylim(len(names) - 0.5, -0.5)
    caption = (
        "Ratios of other measures between the arms, paired by seed: geometric mean "
        "and 95 % t-interval. Descriptive: no verdict is drawn from them."
        f"{summaries.left_out(int(ratios['num_left_out'].sum()), 'pairs')}"
    )
    return Plot(drawn_on.figure, ratios.reset_index(drop=True), name, caption)


def _measure_label(measure: str, note: str) -> str:
    known = described(measure)
    symbol = f" ${known.symbol}$" if known.symbol else ""
    return f"{known.label}{symbol}" + (f"\n{note}" if note else "")


def _draw_ratios(ax: Axes, rows: DataFrame, names: Sequence[str]) -> None:
    ax.axvline(1.0, color=INK, lw=0.7)
    for row in rows.to_dict("records"):
        y = names.index(row["quantity"])
        text = "none"
        if math.isfinite(row["ratio"]):
            ax.plot(row["ratio"], y, "o", color=INK, ms=4)
            text = in_three_digits(row["ratio"])
        if math.isfinite(row["low"]):
            ax.plot([row["low"], row["high"]], [y, y], color=INK, lw=1.2)
            ends = (in_three_digits(row[end]) for end in ("low", "high"))
            text += f" [{', '.join(ends)}]"
        ax.annotate(
            text,
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    ax.set_xlabel("Ratio")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
