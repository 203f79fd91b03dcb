"""The spectrum of a Hessian: where its eigenvalues are, and how many."""

import numpy as np
from matplotlib.axes import Axes
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError
from noisekit.figures import summaries
from noisekit.figures.canvas import UserAxes, canvas, figure_function
from noisekit.figures.plot import Plot
from noisekit.figures.theme import (
    MUTED,
    TWO_COLUMNS,
)

_COLUMNS = ["axis", "kind", "eigenvalue", "value", "low", "high"]
_BULK = "#0072B2"
_OUTLIER = "#D55E00"
# Densities further below the largest are empty space.
_DECADES = 8.0


@figure_function
def spectral_density(
    density: DataFrame,
    *,
    name: str = "spectral_density",
    ax: UserAxes | None = None,
) -> Plot:
    """Draw a spectral density: once over eigenvalues, once over their magnitude.

    Left, the density on a log axis, with the outliers as lines as high as their share
    of all eigenvalues. Right, the share per decade of magnitude, negative eigenvalues
    to the left and positive ones to the right of the middle, which holds all that
    is not resolved from zero, labelled with its share.

    Args:
        density: The ``frame()`` of a spectral density: columns ``axis`` (``linear``,
            ``log``), ``kind`` (``density``, ``atom``, ``zero``), ``eigenvalue``,
            ``value``, ``low`` and ``high``.
        name: Stem of the files.
        ax: Axes of the user's to draw on, two side by side; a new figure by default.

    Returns:
        The plot; its table is the one given, without rows that cannot be drawn.

    Raises:
        EmptyDataError: If there is no density over either axis, or no share about
            zero.
    """
    summaries.require_columns(density, _COLUMNS, figure=name)
    table, dropped = summaries.drawable(
        density, ["eigenvalue", "value", "low", "high"], figure=name
    )
    smooth = table[table["kind"] == "density"]
    parts = {axis: smooth[smooth["axis"] == axis] for axis in ("linear", "log")}
    zero = table[table["kind"] == "zero"]
    wanted = {f"density over the {axis} axis": rows for axis, rows in parts.items()}
    for what, rows in {**wanted, "share about zero": zero}.items():
        if rows.empty:
            raise EmptyDataError(
                f"figure {name!r} needs a {what}, got none; pass the frame() of "
                "nk.spectral_density(...)."
            )
    drawn_on = canvas(columns=2, size=(TWO_COLUMNS, 2.6), ax=ax)
    left, right = drawn_on.axes
    atoms = table[table["kind"] == "atom"]
    _draw_linear(left, parts["linear"], atoms)
    about_zero = float(zero["value"].iloc[0])
    _draw_magnitudes(right, parts["log"], about_zero)
    drawn_on.name_panels()
    count = len(atoms)
    outliers = (
        f" Orange lines: {count} outliers, as high as their share of all eigenvalues."
        if count
        else " No eigenvalue stands apart from the bulk."
    )
    caption = (
        "Density of Hessian eigenvalues by stochastic Lanczos quadrature. (a) Over "
        "the eigenvalue, each node as wide as half the distance of those beside it."
        f"{outliers} (b) Share of all eigenvalues per decade of magnitude, by sign; "
        f"grey: not resolved from zero, {_percent(about_zero)} of all. Bands: 95 % "
        "intervals over probes, point by point."
        f"{summaries.left_out(dropped)}"
    )
    return Plot(drawn_on.figure, table, name, caption)


def _draw_linear(ax: Axes, bulk: DataFrame, atoms: DataFrame) -> None:
    top = max([*bulk["value"], *atoms["value"]], default=1.0)
    floor = top * 10**-_DECADES
    shown = bulk[bulk["value"] > floor]
    _draw_band(ax, shown, floor)
    ax.vlines(atoms["eigenvalue"], floor, atoms["value"], color=_OUTLIER, lw=1.0)
    ax.plot(atoms["eigenvalue"], atoms["value"], "o", color=_OUTLIER, ms=2.5)
    ax.set_yscale("log")
    ax.set_ylim(floor, top * 5)
    ax.set_xlabel("Hessian eigenvalue [loss/param²]")
    ax.set_ylabel("Density, or share of an outlier")


def _draw_magnitudes(ax: Axes, rows: DataFrame, about_zero: float) -> None:
    """Both signs on one axis: the distance from the middle is the magnitude's log."""
    smallest = float(np.log10(rows["eigenvalue"].abs()).min())
    largest = float(np.log10(rows["eigenvalue"].abs()).max())
    for sign in (-1, 1):
        half = rows[np.sign(rows["eigenvalue"]) == sign]
        place = sign * (np.log10(half["eigenvalue"].abs()) - smallest + 0.5)
        _draw_band(ax, half.assign(eigenvalue=place), 0.0)
    ax.axvspan(-0.5, 0.5, color=MUTED, alpha=0.25, lw=0)
    ax.annotate(
        _percent(about_zero),
        (0.0, 1.0),
        xytext=(0, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        color=MUTED,
    )
    # Three labels a side at most fit beside each other.
    step = max(1.0, np.ceil((largest - smallest) / 3))
    decades = np.arange(np.ceil(smallest) + 1, np.floor(largest) + 1, step)
    places = decades - smallest + 0.5
    ax.set_xticks([*-places[::-1], *places])
    labels = [rf"$-10^{{{int(d)}}}$" for d in decades[::-1]]
    ax.set_xticklabels([*labels, *(rf"$10^{{{int(d)}}}$" for d in decades)])
    ax.set_ylim(bottom=0.0)
    ax.set_xlabel("Hessian eigenvalue [loss/param²]")
    ax.set_ylabel("Share of eigenvalues\nper decade")


def _draw_band(ax: Axes, rows: DataFrame, floor: float) -> None:
    x = rows["eigenvalue"]
    low, high = rows["low"].clip(lower=floor), rows["high"].clip(lower=floor)
    ax.fill_between(x, low, high, color=_BULK, alpha=0.25, lw=0)
    ax.plot(x, rows["value"], color=_BULK, lw=0.9)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
