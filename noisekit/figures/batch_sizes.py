"""Squared gradient norms of drawn batches against their size."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from pandas import DataFrame

from noisekit.core.errors import UsageError
from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, arm_handle, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    TWO_COLUMNS,
    ArmStyle,
    arm_styles,
    described,
    log_limits,
    plain_log_ticks,
    two_line_label,
)


@figure_function
def grad_sq_norm_against_batch_size(
    draws: DataFrame,
    moments: DataFrame,
    *,
    num_examples: int,
    styles: Mapping[str, ArmStyle] | None = None,
    name: str = "grad_sq_norm_against_batch_size",
    ax: UserAxes | None = None,
) -> Plot:
    r"""Draw the squared gradient norm at frozen weights against batch size.

    Left the gradient of the mean loss, right that of the summed loss (times B²).
    The line is not fitted: it is what the gradient on all N examples and the
    covariance of theirs demand of batches drawn without replacement, so the dots
    must follow it. It checks the instrument.

    .. math:: E\|g_B\|^2 = \|g_N\|^2 + \frac{\mathrm{tr}\,\Sigma}{B}
              \left(1 - \frac{B}{N}\right)

    The identity is exact with the covariance's n - 1 denominator and the squared
    norm of the full gradient as it is; a debiased one would lie below it.

    Args:
        draws: Columns ``arm``, ``batch_size`` and ``grad_sq_norm`` of the mean
            gradient, one row a drawn batch.
        moments: Columns ``arm``, ``grad_sq_norm`` (of the gradient on all N
            examples) and ``variance_trace``, one row an arm.
        num_examples: N, from which the batches were drawn without replacement.
        styles: From ``arm_styles``; made from the draws by default.
        name: Stem of the files.
        ax: Axes of the user's to draw on, two side by side; a new figure by default.

    Returns:
        The plot; its table has a row for each mean over draws (``kind`` is ``mean``,
        with ``low`` and ``high``) and each point of the line (``expected``), of the
        mean loss.

    Raises:
        UsageError: If an arm has no moments, or a batch more than N examples.

    Source:
        Shen 2018, "Effect of batch size on training dynamics"; McCandlish et al.
        2018, arXiv:1812.06162, appendix A.1.
    """
    columns = ["batch_size", "grad_sq_norm"]
    summaries.require_columns(draws, ["arm", *columns], figure=name)
    finite, dropped = summaries.drawable(draws, columns, figure=name)
    _check_moments(finite, moments, num_examples, figure=name)
    styles = styles or arm_styles(draws[["arm"]])
    table = _batch_size_table(finite, moments, num_examples)
    drawn_on = canvas(1, 2, size=(TWO_COLUMNS, 2.7), ax=ax)
    row = drawn_on.axes
    drawn = [arm for arm in styles if arm in set(table["arm"])]
    for panel, power in zip(row, (0, 2), strict=True):
        scaled = _times_batch_size(table, power)
        panel.set(xscale="log", yscale="log")
        panel.set_ylim(*log_limits(scaled["value"], pad=3.0))
        for arm in drawn:
            _draw_batch_sizes(panel, scaled[scaled["arm"] == arm], styles[arm])
        _name_sizes(panel, sorted(set(finite["batch_size"])))
        plain_log_ticks(panel.yaxis)
        panel.set_xlabel(described("batch_size").axis_label)
    known = described("grad_sq_norm")
    row[0].set_title("Mean loss")
    row[0].set_ylabel(two_line_label("grad_sq_norm"))
    row[1].set_title("Summed loss")
    row[1].set_ylabel(rf"$B^2\,{known.symbol}$ [{known.unit}]")
    drawn_on.name_panels()
    drawn_on.legend([arm_handle(styles[arm]) for arm in drawn])
    caption = (
        f"Squared gradient norm at frozen weights against batch size. Dots: mean over "
        f"drawn batches with its 95 % t-interval; line: expected from the gradient and "
        f"its covariance on all {num_examples} examples, not fitted."
        f"{summaries.left_out(dropped, 'draws')}"
    )
    return Plot(drawn_on.figure, table, name, caption)


def _check_moments(
    draws: DataFrame, moments: DataFrame, num_examples: int, *, figure: str
) -> None:
    columns = ["grad_sq_norm", "variance_trace"]
    summaries.require_columns(moments, ["arm", *columns], figure=figure)
    known, _ = summaries.drawable(moments, columns, figure=figure)
    absent = [arm for arm in draws["arm"].unique() if arm not in set(known["arm"])]
    if absent:
        raise UsageError(
            f"figure {figure!r} needs finite moments of every arm that has draws, got "
            f"none of {', '.join(absent)}; add them or leave the arm out."
        )
    largest = draws["batch_size"].max()
    if largest > num_examples:
        raise UsageError(
            f"figure {figure!r} needs batches drawn without replacement from "
            f"{num_examples} examples, got one of {largest:g}; pass the number of "
            "examples that the batches came from."
        )


def _batch_size_table(
    draws: DataFrame, moments: DataFrame, num_examples: int
) -> DataFrame:
    means = [
        {"arm": arm, "batch_size": size, "kind": "mean"}
        | summaries.mean_interval(rows["grad_sq_norm"].to_numpy())
        for (arm, size), rows in draws.groupby(["arm", "batch_size"], sort=True)
    ]
    sizes = np.geomspace(draws["batch_size"].min(), draws["batch_size"].max(), 60)
    curves = []
    for row in moments[moments["arm"].isin(set(draws["arm"]))].to_dict("records"):
        noise = row["variance_trace"] / sizes * (1 - sizes / num_examples)
        expected = row["grad_sq_norm"] + noise
        curves.append(
            DataFrame({"batch_size": sizes, "value": expected}).assign(
                arm=row["arm"], kind="expected"
            )
        )
    table = pd.concat([DataFrame(means), *curves], ignore_index=True)
    columns = ["kind", "arm", "batch_size", "value", "low", "high", "num_seeds"]
    table = table[columns].rename(columns={"num_seeds": "num_draws"})
    return table.astype({"num_draws": "Int64"})


def _times_batch_size(table: DataFrame, power: int) -> DataFrame:
    """Return the values of a loss that is summed where ``power`` is 2."""
    factor = table["batch_size"] ** power
    return table.assign(
        **{column: table[column] * factor for column in ("value", "low", "high")}
    )


def _draw_batch_sizes(ax: Axes, table: DataFrame, style: ArmStyle) -> None:
    means = table[table["kind"] == "mean"].dropna(subset="value")
    bottom = ax.get_ylim()[0]
    ax.vlines(
        means["batch_size"],
        means["low"].clip(lower=bottom),
        means["high"],
        color=style.color,
        lw=1,
    )
    ax.plot(
        means["batch_size"],
        means["value"],
        style.marker,
        color=style.color,
        ms=5,
        mec="white",
        mew=0.6,
    )
    curve = table[table["kind"] == "expected"].sort_values("batch_size")
    ax.plot(
        curve["batch_size"],
        curve["value"],
        color=style.color,
        ls=style.linestyle,
        lw=1,
    )


def _name_sizes(ax: Axes, sizes: Sequence[float]) -> None:
    """Put ticks at the sizes that were drawn; at every second if they are many."""
    every = sizes[:: 1 + (len(sizes) - 1) // 10]
    ax.xaxis.set_major_locator(FixedLocator(every))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
