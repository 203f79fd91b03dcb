"""The look of every figure: sizes, fonts, and one mark per arm.

Nothing here changes Matplotlib's global settings beyond a ``with`` block, and what is
drawn on axes of the user's follows the user's settings.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike
from pandas import DataFrame

from noisekit.core.vocabulary import QUANTITIES, Quantity

ONE_COLUMN = 3.4
"""Width of a one-column figure [inch]."""
TWO_COLUMNS = 7.0
"""Width of a two-column figure [inch]."""

INK = "#222222"
MUTED = "#6b6b6b"
ZONE = "#e9e6dc"
"""Fill of a margin zone: inside it, a difference is too small to matter."""

LineStyle = Literal["-"] | tuple[float, tuple[float, ...]]

_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib: same figure everywhere
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "legend.columnspacing": 1.4,
    "figure.titlesize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "mathtext.fontset": "dejavusans",
    "pdf.fonttype": 42,  # TrueType, embedded: journals refuse Type 3
    "svg.fonttype": "path",
    "svg.hashsalt": "noisekit",
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
}
# Of the ten colours that stay apart under colour blindness, those that show on
# white, in an order in which neighbours differ most.
_COLORS = [sns.color_palette("colorblind").as_hex()[i] for i in (0, 3, 2, 4, 1, 5, 9)]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
_LINES: tuple[LineStyle, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (5, 1.5, 1.2, 1.5)),
)


@contextmanager
def themed() -> Iterator[None]:
    """Draw with noisekit's settings inside the block; the user's are back after it."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)  # type: ignore[arg-type]  # keys are literals
        yield


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How one arm is drawn: distinguished by colour, marker and line."""

    label: str
    color: str
    marker: str
    linestyle: LineStyle


def styles_of(labels: Mapping[str, str]) -> dict[str, ArmStyle]:
    """Return a style for each name, in the order given, with these labels."""
    return {
        name: ArmStyle(
            label,
            _COLORS[i % len(_COLORS)],
            _MARKERS[i % len(_MARKERS)],
            _LINES[i % len(_LINES)],
        )
        for i, (name, label) in enumerate(labels.items())
    }


def arm_styles(runs: DataFrame) -> dict[str, ArmStyle]:
    """Return a style per arm, in the order in which figures show them.

    Make it once, from the table of runs, and pass it to every figure, so that an arm
    looks the same in all of them. Its ``label`` is the name of the arm in all text,
    too: batch size and learning rate where these are all that the arms differ in, and
    then the smallest come first; else the arm's own name, in the order of the table.

    Args:
        runs: Table with the column ``arm``, and the arms' factors where known, in front
            of ``run_id``.
    """
    first = runs.drop_duplicates("arm").set_index("arm", drop=False)
    constant = runs.groupby("arm").nunique().max() <= 1
    factors = [name for name in _FACTOR_WORDS if constant.get(name, False)]
    if factors and not _differ_otherwise(first):
        first = first.sort_values(factors, kind="stable")
        labels = {
            str(arm): _factor_label(first.loc[arm], factors) for arm in first.index
        }
        if len(set(labels.values())) == len(labels) and all(labels.values()):
            return styles_of(labels)
    arms = [str(arm) for arm in runs["arm"].drop_duplicates()]
    return styles_of({arm: arm_words(arm) for arm in arms})


def arm_words(name: str) -> str:
    """Return an arm's name in words: ``fork/batch_size=16`` is fork, batch size 16."""
    return name.replace("_", " ").replace("/", ", ").replace("=", " ")


_FACTOR_WORDS = {"batch_size": "batch", "learning_rate": "rate"}


def _differ_otherwise(first: DataFrame) -> bool:
    """Whether arms differ in more than batch size and rate, such as in the network."""
    columns = list(first.columns)
    factors = columns[: columns.index("run_id")] if "run_id" in columns else []
    return any(
        first[name].astype(str).nunique() > 1
        for name in factors
        if name not in _FACTOR_WORDS
    )


def _factor_label(row: Mapping[Hashable, float], factors: Sequence[str]) -> str:
    values = {name: float(row[name]) for name in factors}
    if not all(map(math.isfinite, values.values())):
        return ""
    return ", ".join(f"{_FACTOR_WORDS[name]} {v:g}" for name, v in values.items())


def snapshot_words(name: str) -> str:
    """Return a snapshot's name in words: ``loss_0.05`` is at training loss 0.05."""
    if name.startswith("loss_"):
        return f"training loss {name.removeprefix('loss_')}"
    return name.replace("_", " ")


def described(name: str) -> Quantity:
    """Return a quantity of the vocabulary, or the words of a column of the user's."""
    words = name.replace("_", " ")
    unknown = Quantity(name, "", "", words[:1].upper() + words[1:], "")
    return QUANTITIES.get(name, unknown)


def two_line_label(name: str) -> str:
    """Return the axis label of a quantity with symbol and unit on a second line."""
    known = described(name)
    return known.axis_label.replace(f"{known.label} ", f"{known.label}\n", 1)


def plain_log_ticks(axis: Axis) -> None:
    """Write a log axis in plain numbers, and 1, 2, 5 of each decade if it is short."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    plain = low > 5e-5 and high < 2e5
    subs = [1.0, 2.0, 5.0] if decades < 2.6 else [1.0]
    if decades < 0.8:
        subs = [1.0, 1.5, 2.0, 3.0, 5.0, 7.0]
    axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(_plain_number if plain else _power_of_ten))
    axis.set_minor_formatter(NullFormatter())


def _plain_number(value: float, _: object = None) -> str:
    return f"{value:.6g}"


def _power_of_ten(value: float, _: object = None) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**exponent
    power = f"10^{{{exponent}}}"
    if math.isclose(mantissa, 1.0):
        return f"${power}$"
    return rf"${mantissa:g}\times{power}$"


def in_three_digits(value: float) -> str:
    """Write a positive number with three significant digits, zeros kept."""
    return f"{value:#.3g}".rstrip(".")


def log_limits(values: ArrayLike, *, pad: float = 1.15) -> tuple[float, float]:
    """Return limits of a log axis that hold all positive finite ``values``.

    Where there is none, the axis goes from 0.1 to 10.
    """
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array) & (array > 0)]
    if not array.size:
        return 0.1, 10.0
    return float(array.min()) / pad, float(array.max()) * pad
