"""Gradient noise over training."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from pandas import DataFrame

from noisekit.core.results import Estimate, Ratio, Status
from noisekit.figures import summaries
from noisekit.figures.canvas import (
    UserAxes,
    arm_handle,
    canvas,
    draw_levels,
    figure_function,
)
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    INK,
    TWO_COLUMNS,
    ArmStyle,
    arm_styles,
    described,
    log_limits,
    plain_log_ticks,
)

_PARTS = ("grad_sq_norm", "variance_trace", "debiased_grad_sq_norm")
_OVER_TRAINING = ("grad_sq_norm", "variance_trace", "simple_noise_scale")


@figure_function
def noise_over_training(
    steps: DataFrame,
    *,
    num_windows: int = 12,
    styles: Mapping[str, ArmStyle] | None = None,
    name: str = "noise_over_training",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw squared gradient norm, gradient variance and noise scale over training.

    Readings are averaged over windows of updates, part by part, and divided after
    that. Where a window's noise scale is not resolved from above, an open triangle
    marks the lower end of its confidence set: the truth is there or higher.

    Args:
        steps: Columns ``step``, ``grad_sq_norm``, ``variance_trace`` and
            ``debiased_grad_sq_norm``, as ``probe.frame()`` has them, and ``arm`` and
            ``seed`` where there are several; ``batch_size`` is drawn as a dotted line
            beside the noise scale.
        num_windows: Windows of equal length in updates, per arm.
        styles: From ``arm_styles``; made from the table by default.
        name: Stem of the files.
        ax: Axes of the user's to draw on, three side by side; a new figure by default.

    Returns:
        The plot; its table is that of ``windowed_noise``.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1 (parts are averaged,
        not ratios).
    """
    steps = summaries.with_runs(steps)
    columns = ["arm", "seed", "step", *_PARTS]
    summaries.require_columns(steps, columns, figure=name)
    readings, dropped = summaries.drawable(steps, ["step", *_PARTS], figure=name)
    styles = styles or arm_styles(steps)
    table = windowed_noise(readings, num_windows=num_windows)
    drawn_on = canvas(1, 3, size=(TWO_COLUMNS, 2.6), ax=ax)
    drawn = [arm for arm in styles if arm in set(table["arm"])]
    for panel, measured in zip(drawn_on.axes, _OVER_TRAINING, strict=True):
        known = described(measured)
        panel.set_yscale("log")
        panel.set_xlabel(described("step").axis_label)
        panel.set_title(known.label)
        panel.set_ylabel(f"${known.symbol}$ [{known.unit}]")
        for arm in drawn:
            rows = table[(table["arm"] == arm) & (table["quantity"] == measured)]
            _draw_windows(panel, rows, styles[arm])
        panel.set_ylim(*log_limits(_drawn(table, measured), pad=1.3))
    _mark_batch_sizes(drawn_on.axes[-1], readings, styles)
    for panel in drawn_on.axes:
        plain_log_ticks(panel.yaxis)
    drawn_on.name_panels()
    unresolved = table[table["status"] == Status.NOT_RESOLVED]
    bounds = len(unresolved)
    handles = [arm_handle(styles[arm]) for arm in drawn]
    if bounds:
        handles.append(_bound_handle())
    drawn_on.legend(handles)
    caption = (
        f"Squared norm of the applied gradient, trace of the per-example gradient "
        f"covariance, and their noise scale, averaged over windows of updates and over "
        f"seeds; bands: 95 % confidence sets over {_samples(readings)}. Dotted: the "
        f"arm's batch size.{_bound_words(unresolved)}"
        f"{summaries.left_out(dropped, 'readings')}"
    )
    return Plot(drawn_on.figure, table, name, caption)


def _drawn(table: DataFrame, measured: str) -> NDArray[np.float64]:
    """Return what is drawn of a quantity: of a bound only its end."""
    rows = table[table["quantity"] == measured]
    bound = rows["status"] == Status.NOT_RESOLVED
    inside = rows.loc[~bound, ["value", "low", "high"]].to_numpy(dtype=float)
    return np.append(inside.ravel(), rows.loc[bound, "low"].to_numpy(dtype=float))


def _bound_words(unresolved: DataFrame) -> str:
    if unresolved.empty:
        return ""
    noun = "window" if len(unresolved) == 1 else "windows"
    text = (
        f" Open triangles: {len(unresolved)} {noun} whose noise scale is not resolved "
        "from above, at the lower end of the set"
    )
    nothing = int((~(unresolved["low"] > 0)).sum())
    return (
        f"{text}; on the lower edge, {nothing} with no bound."
        if nothing
        else f"{text}."
    )


def windowed_noise(readings: DataFrame, *, num_windows: int) -> DataFrame:
    """Return window averages per arm with confidence sets, the noise scale by parts.

    With two seeds or more a sample is one seed's average over the window, else it
    is one reading. The noise scale is the ratio of the averages with Fieller's set;
    ``status`` is ``not_resolved`` where that has no upper end.

    Returns:
        Columns ``arm``, ``quantity``, ``step`` (the window's centre), ``value``,
        ``low``, ``high``, ``num_samples`` and ``status``.
    """
    result = []
    for arm, rows in readings.groupby("arm", sort=False):
        first, last = rows["step"].min(), rows["step"].max()
        edges = np.linspace(first, last + 1, num_windows + 1)
        window = np.digitize(rows["step"], edges)
        by_seed = rows["seed"].nunique() > 1
        for _, inside in rows.groupby(window):
            parts = inside[["seed", *_PARTS]]
            samples = parts.groupby("seed").mean() if by_seed else parts[list(_PARTS)]
            place = {"arm": arm, "step": float(inside["step"].mean())}
            result += [place | row for row in _window_rows(samples)]
    columns = ["arm", "quantity", "step", "value", "low", "high", "num_samples"]
    return DataFrame(result)[[*columns, "status"]]


def _window_rows(samples: DataFrame) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    n = len(samples)
    for measured in _OVER_TRAINING:
        if measured == "simple_noise_scale":
            row = _ratio_row(samples)
        else:
            result = summaries.mean_interval(samples[measured].to_numpy())
            row = {key: result[key] for key in ("value", "low", "high")}
            row["status"] = str(Status.OK)
        rows.append({"quantity": measured, "num_samples": n, **row})
    return rows


def _ratio_row(samples: DataFrame) -> dict[str, object]:
    top, bottom = "variance_trace", "debiased_grad_sq_norm"
    n, means = len(samples), samples.mean()
    value = means[top] / means[bottom] if means[bottom] > 0 else math.inf
    if n < 2:
        status = Status.OK if math.isfinite(value) else Status.NOT_RESOLVED
        low = math.nan if math.isfinite(value) else 0.0
        return {"value": value, "low": low, "high": math.nan, "status": str(status)}
    spread = np.cov(samples[[top, bottom]].to_numpy(dtype=float), rowvar=False) / n
    ratio = Ratio(
        numerator=float(means[top]),
        denominator=float(means[bottom]),
        numerator_variance=float(spread[0, 0]),
        denominator_variance=float(spread[1, 1]),
        covariance=float(spread[0, 1]),
    )
    interval = Estimate(value, ratio=ratio, dof=n - 1).interval(0.95)
    low, high, status = interval.low, interval.high, Status.NOT_RESOLVED
    if interval.bounded and math.isfinite(value):
        status = Status.OK
    elif interval.bounded:  # a squared norm below zero: nothing is known of the ratio
        low, high = 0.0, math.inf
    return {"value": value, "low": low, "high": high, "status": str(status)}


def _draw_windows(ax: Axes, rows: DataFrame, style: ArmStyle) -> None:
    # Windows that are not resolved break the line: nothing is known between.
    known = rows["status"] == Status.OK
    value, low, high = (rows[name].where(known) for name in ("value", "low", "high"))
    low = low.where(~(low <= 0), np.finfo(float).tiny)
    ax.fill_between(rows["step"], low, high, color=style.color, alpha=0.2, lw=0)
    between = known.shift(1, fill_value=False) | known.shift(-1, fill_value=False)
    alone = known & ~between  # a band needs a neighbour
    x, ends = rows["step"][alone], (low[alone], high[alone])
    ax.vlines(x, *ends, color=style.color, alpha=0.35, lw=2)
    ax.plot(
        rows["step"],
        value,
        color=style.color,
        linestyle=style.linestyle,
        lw=1,
        marker=style.marker,
        markersize=2.5,
    )
    bounds = rows.loc[rows["status"] == Status.NOT_RESOLVED, ["step", "low"]]
    _draw_bounds(ax, bounds, style.color)


def _draw_bounds(ax: Axes, bounds: DataFrame, color: str) -> None:
    known = bounds["low"] > 0
    edge = ax.get_xaxis_transform()
    for rows, height, transform in (
        (bounds[known], bounds["low"][known], ax.transData),
        (bounds[~known], 0.03 * (~known)[~known], edge),  # nothing known: on the edge
    ):
        ax.plot(
            rows["step"],
            height,
            "^",
            mfc="white",
            mec=color,
            ms=4,
            mew=0.8,
            transform=transform,
        )


def _bound_handle() -> Line2D:
    return Line2D(
        [],
        [],
        color=INK,
        marker="^",
        mfc="white",
        ls="none",
        ms=4,
        label="not resolved: here or higher",
    )


def _mark_batch_sizes(
    ax: Axes, readings: DataFrame, styles: Mapping[str, ArmStyle]
) -> None:
    if "batch_size" not in readings.columns:
        return
    sizes = readings.groupby("arm", sort=False)["batch_size"].first()
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, sizes.min() / 1.3), max(high, sizes.max() * 1.3))
    draw_levels(ax, {str(arm): float(size) for arm, size in sizes.items()}, styles)


def _samples(readings: DataFrame) -> str:
    per_arm = readings.groupby("arm")["seed"].nunique()
    return "seeds" if per_arm.min() > 1 else "readings"
