"""Claims with their intervals, their margins and their verdicts."""

import math
import textwrap
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError
from noisekit.figures.canvas import UserAxes, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    INK,
    MUTED,
    TWO_COLUMNS,
    ZONE,
    arm_words,
    described,
    in_three_digits,
    plain_log_ticks,
)
from noisekit.stats import ClaimResult, Verdict, claim_titles

_LABEL = 44  # characters of a line beside an axis
_ROW = 0.42
"""Height of one claim [inch]."""


@figure_function
def claim_forest(
    results: Sequence[ClaimResult],
    *,
    arms: Mapping[str, str] | None = None,
    name: str = "claims",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw the effect of each claim with its interval, margin and verdict.

    The bar is the interval that decides. Each quantity has an axis, a log axis for
    ratios; differences of fractions are in points. Primary claims are filled. A
    claim without an effect keeps its row and is labelled so.

    Args:
        results: From ``judge``, in the order in which they are read.
        arms: The name under which each arm is shown; by default the recipe's.
        name: Stem of the files.
        ax: Axes of the user's to draw on, one per quantity; a new figure by default.

    Returns:
        The plot; its table has one row a claim, in the units that are drawn.

    Raises:
        EmptyDataError: If there is no claim.
    """
    if not results:
        raise EmptyDataError(
            f"figure {name!r} needs at least one judged claim, got none; runs that "
            "claim nothing have no forest plot."
        )
    titles = claim_titles([result.claim for result in results])
    table = DataFrame(
        [_row(result, titles[result.claim.name], arms or {}) for result in results]
    )
    groups = list(dict.fromkeys(table["axis"]))
    counts = [int((table["axis"] == group).sum()) for group in groups]
    size = (TWO_COLUMNS, 0.35 + sum(0.62 + _ROW * count for count in counts))
    drawn_on = canvas(len(groups), size=size, ax=ax, heights=counts)
    for panel, group in zip(drawn_on.axes, groups, strict=True):
        _draw_group(panel, table[table["axis"] == group], group)
    drawn_on.legend(_legend_entries())
    caption = (
        "Claims stated before the runs. Point: effect, paired by seed where two groups "
        "are compared; line: the null; bar: the "
        f"interval that decides; shaded: the margin inside which a difference is too "
        "small to matter. Filled points are primary, with intervals adjusted for their "
        f"number; open ones are descriptive.{_without_effect(table)}"
    )
    return Plot(
        drawn_on.figure, table.drop(columns=["axis", "arms", "over"]), name, caption
    )


def _without_effect(table: DataFrame) -> str:
    count = int((~np.isfinite(table["effect"])).sum())
    if not count:
        return ""
    points = "the point of 1 claim" if count == 1 else f"{count} claims' points"
    return f" Left out: {points} without a finite pair."


def _row(result: ClaimResult, title: str, arms: Mapping[str, str]) -> dict[str, object]:
    claim, statistic = result.claim, result.claim.statistic
    ratio = claim.scale == "ratio"
    names = [arms.get(arm, arm_words(arm)) for arm in statistic.groups if arm]
    treatment, reference = (*names, "", "")[:2]
    known = described(claim.quantity)
    factor, compared = 1.0, ", ratio" if ratio else ", difference"
    what = ", ".join(part for part in (known.label, statistic.words()) if part)
    axis = f"{what}{compared if claim.compares else ', as a factor' if ratio else ''}"
    unit = known.unit if statistic.unit is None else statistic.unit
    if not ratio:
        factor = 100.0 if unit == "fraction" else 1.0
        fraction = "points" if claim.compares else "%"
        unit = fraction if unit == "fraction" else unit
        axis += f" [{unit}]" if unit else ""
    over = f"{'over' if ratio else 'minus'} {reference}" if reference else ""
    interval = result.interval
    low, high = claim.margin_ends
    return {
        "claim": claim.name,
        "label": title,
        "statistic": statistic.name,
        "quantity": claim.quantity,
        "treatment": statistic.treatment,
        "reference": statistic.reference or "",
        "snapshot": statistic.snapshot or "",
        "primary": claim.primary,
        "scale": claim.scale,
        "axis": axis,
        "arms": treatment,
        "over": over,
        "effect": result.effect * factor,
        "low": interval.low * factor if interval.bounded else math.nan,
        "high": interval.high * factor if interval.bounded else math.nan,
        "level": interval.level,
        "null": claim.null * factor,
        "margin_low": low * factor,
        "margin_high": high * factor,
        "num_pairs": result.num_pairs,
        "error_over": result.error_over,
        "p_no_effect": result.p_value,
        "verdict": str(result.verdict),
        "reason": result.reason,
    }


def _draw_group(ax: Axes, rows: DataFrame, group: str) -> None:
    ratio = rows["scale"].iloc[0] == "ratio"
    ax.set_xscale("log" if ratio else "linear")
    for y, row in enumerate(rows.to_dict("records")):
        ax.plot([row["null"]] * 2, [y - 0.5, y + 0.5], color=INK, lw=0.7, zorder=2)
        _draw_claim(ax, y, row)
    ax.set_yticks(range(len(rows)), [_names(row) for row in rows.to_dict("records")])
    ax.set_ylim(len(rows) - 0.45, -0.55)
    ax.set_xlim(*_limits(rows, log=ratio))
    ax.set_xlabel(group)
    if ratio:
        plain_log_ticks(ax.xaxis)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _names(row: Mapping[Hashable, object]) -> str:
    arms = f"{row['arms']} {row['over']}"
    if len(arms) > _LABEL:
        arms = f"{row['arms']}\n{row['over']}"
    return f"{textwrap.fill(str(row['label']), _LABEL)}\n{arms}"


def _draw_claim(ax: Axes, y: int, row: Mapping[Hashable, object]) -> None:
    number = {key: value for key, value in row.items() if isinstance(value, float)}
    width = number["margin_high"] - number["margin_low"]
    corner = (number["margin_low"], y - 0.38)
    ax.add_patch(Rectangle(corner, width, 0.76, color=ZONE, lw=0, zorder=1))
    if math.isfinite(number["effect"]):
        ends = [number["low"], number["high"]]
        ax.plot(ends, [y, y], color=INK, lw=1.4, solid_capstyle="butt")
        fill = INK if row["primary"] else "white"
        ax.plot(number["effect"], y, "o", mfc=fill, mec=INK, ms=5, mew=0.9, zorder=4)
    for text, offset, weight, color in (
        (_verdict_words(str(row["verdict"])), 4.5, "bold", INK),
        (_numbers(number, log=row["scale"] == "ratio"), -4.5, "normal", MUTED),
    ):
        ax.annotate(
            text,
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, offset),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=7,
            fontweight=weight,
        )


def _verdict_words(verdict: str) -> str:
    if verdict == Verdict.NOT_JUDGED:
        return "no verdict"
    return verdict


def _numbers(number: Mapping[Hashable, float], *, log: bool) -> str:
    if not math.isfinite(number["effect"]):
        return "no effect"
    write = in_three_digits if log else _signed
    effect, low, high = (write(number[key]) for key in ("effect", "low", "high"))
    if math.isnan(number["low"]):
        return effect
    return f"{effect} [{low}, {high}]"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _limits(rows: DataFrame, *, log: bool) -> tuple[float, float]:
    columns = ["effect", "null", "margin_low", "margin_high", "low", "high"]
    values = [v for v in rows[columns].to_numpy().ravel() if math.isfinite(v)]
    low, high = min(values), max(values)
    if log:
        pad = (high / low) ** 0.06
        return low / pad, high * pad
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def _legend_entries() -> list[Line2D | Patch]:
    point = {"color": INK, "marker": "o", "ls": "none", "ms": 5}
    return [
        Line2D([], [], **point, label="primary"),  # type: ignore[arg-type]
        Line2D([], [], **point, mfc="white", label="descriptive"),  # type: ignore[arg-type]
        Line2D([], [], color=INK, lw=1.4, label="interval that decides"),
        Patch(color=ZONE, lw=0, label="within the margin"),
    ]
