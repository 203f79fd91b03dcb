"""Sharpness along a run: the largest eigenvalue against the training loss."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError
from noisekit.core.results import Status
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
    MUTED,
    ONE_COLUMN,
    ArmStyle,
    arm_styles,
    described,
    log_limits,
    plain_log_ticks,
    two_line_label,
)


@figure_function
def sharpness_against_loss(
    measurements: DataFrame,
    snapshots: DataFrame,
    *,
    measured: str = "lambda_max",
    thresholds: Mapping[str, float] | None = None,
    variant: str | None = None,
    styles: Mapping[str, ArmStyle] | None = None,
    name: str = "sharpness_against_loss",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw sharpness against training loss along the runs, on log axes.

    Training goes to the right: the loss axis falls. Each dot is one seed at one
    snapshot, open where the solver did not converge; lines join the medians over
    the seeds of an arm. At one loss, arms can be compared; at different losses
    they cannot.

    Args:
        measurements: Columns ``run_id``, ``snapshot``, ``quantity``, ``value`` and,
            where known, ``status``.
        snapshots: Columns ``run_id``, ``arm``, ``seed``, ``snapshot`` and
            ``train_loss``.
        measured: Sharpness measure, a name from the vocabulary.
        thresholds: Arm to the sharpness above which its optimizer is unstable
            (2/η for plain gradient descent), drawn as a line.
        variant: Which setting of the measure, the first in the table by default.
        styles: From ``arm_styles``; made from the table by default.
        name: Stem of the files.
        ax: Axes of the user's to draw on; a new figure by default.

    Returns:
        The plot; its table has a row for each dot (``kind`` is ``seed``) and each
        arm's median at a snapshot (``kind`` is ``median``).

    Raises:
        EmptyDataError: If nothing was measured at a snapshot with a loss.
    """
    table, dropped = _joined(
        measurements, snapshots, measured, variant=variant, figure=name
    )
    styles = styles or arm_styles(snapshots)
    medians, shown = _medians(table), summaries.shown_seeds(table)
    drawn_on = canvas(size=(ONE_COLUMN, 3.0), ax=ax)
    [panel] = drawn_on.axes
    drawn = [arm for arm in styles if arm in set(table["arm"])]
    for arm in drawn:
        dots, middle = (rows[rows["arm"] == arm] for rows in (shown, medians))
        _draw_arm(panel, dots, middle, styles[arm])
    panel.set(xscale="log", yscale="log")
    panel.set_xlabel(described("train_loss").axis_label + ", falling to the right")
    panel.set_ylabel(two_line_label(measured))
    high_to_low = log_limits(table["train_loss"].to_numpy(), pad=1.3)[::-1]
    panel.set_xlim(*high_to_low)
    handles = [arm_handle(styles[arm]) for arm in drawn]
    unsure = int((table["status"] == Status.NOT_CONVERGED).sum())
    if unsure:
        handles.append(_open_handle())
    drawn_on.legend(handles)
    lines = _draw_thresholds(panel, thresholds or {}, styles)
    plain_log_ticks(panel.xaxis)
    plain_log_ticks(panel.yaxis)
    setting = f" ({table['variant'].iloc[0]})" if table["variant"].iloc[0] else ""
    doubt = f" Open dots: {unsure} not converged." if unsure else ""
    caption = (
        f"{described(measured).label}{setting} against training loss along the runs. "
        "Dots: each seed at each snapshot; lines: medians over seeds, joined along "
        f"training.{doubt}{lines}{summaries.shown_words(table)}"
        f"{summaries.left_out(dropped)}"
    )
    both = pd.concat(
        [table.assign(kind="seed"), medians.assign(kind="median")], ignore_index=True
    )
    return Plot(drawn_on.figure, both.astype({"seed": "Int64"}), name, caption)


def _joined(
    measurements: DataFrame,
    snapshots: DataFrame,
    measured: str,
    *,
    variant: str | None,
    figure: str,
) -> tuple[DataFrame, int]:
    summaries.require_columns(
        measurements, ["run_id", "snapshot", "quantity", "value"], figure=figure
    )
    summaries.require_columns(
        snapshots, ["run_id", "arm", "seed", "snapshot", "train_loss"], figure=figure
    )
    values = measurements[measurements["quantity"] == measured]
    if values.empty:
        known = ", ".join(sorted(set(measurements["quantity"].astype(str))))
        raise EmptyDataError(
            f"figure {figure!r} needs measurements of {measured!r}, got only {known}; "
            "add it to the recipe's measure.everywhere."
        )
    values = summaries.one_variant(values, measured, variant, figure=figure)
    if "status" not in values.columns:
        values = values.assign(status=str(Status.OK))
    where = snapshots[["run_id", "arm", "seed", "snapshot", "train_loss"]]
    table = values[
        ["run_id", "snapshot", "quantity", "variant", "value", "status"]
    ].merge(where, on=["run_id", "snapshot"], how="inner")
    if table.empty:
        raise EmptyDataError(
            f"figure {figure!r} needs {measured!r} at a snapshot of the same run, got "
            "measurements and snapshots that have no run and snapshot in common; take "
            "both tables from the same runs."
        )
    columns = ["train_loss", "value"]
    return summaries.drawable(table, columns, figure=figure, positive=columns)


def _medians(table: DataFrame) -> DataFrame:
    by = ["arm", "quantity", "snapshot"]
    medians = table.groupby(by, sort=False)[["train_loss", "value"]].median()
    return medians.reset_index().sort_values(
        ["arm", "train_loss"], ascending=[True, False], ignore_index=True
    )


def _draw_arm(ax: Axes, dots: DataFrame, medians: DataFrame, style: ArmStyle) -> None:
    converged = dots["status"] != Status.NOT_CONVERGED
    for rows, fill in ((dots[converged], style.color), (dots[~converged], "white")):
        ax.plot(
            rows["train_loss"],
            rows["value"],
            style.marker,
            ms=2.8,
            mfc=fill,
            mec=style.color,
            mew=0.4,
            alpha=0.55,
        )
    ax.plot(
        medians["train_loss"],
        medians["value"],
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        ms=4.5,
        mec="white",
        mew=0.5,
    )


def _draw_thresholds(
    ax: Axes, thresholds: Mapping[str, float], styles: Mapping[str, ArmStyle]
) -> str:
    low, high = ax.get_ylim()
    near = {arm: t for arm, t in thresholds.items() if low / 3 < t < high * 3}
    draw_levels(ax, near, styles)
    for threshold in set(near.values()):
        ax.annotate(
            f"unstable above {threshold:.3g}",
            (1.0, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(0, 1.5),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=MUTED,
            fontsize=7,
        )
    far = [styles[arm].label for arm in thresholds if arm not in near]
    text = " Dotted, in the arm's colour: where its rate is unstable." if near else ""
    if far:
        text += f" That line is out of the picture for {'; '.join(far)}."
    return text


def _open_handle() -> Line2D:
    return Line2D(
        [],
        [],
        color=INK,
        marker="o",
        mfc="white",
        ls="none",
        ms=3,
        label="not converged",
    )
