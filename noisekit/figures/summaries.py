"""From tidy tables to the numbers that figures draw; nothing here draws."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pandas import DataFrame
from scipy.special import stdtrit

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.core.results import Estimate

MOST_SEEDS = 40
"""Seeds of an arm that are drawn one by one."""


def with_runs(frame: DataFrame) -> DataFrame:
    """Return a table with an arm, a seed and a split, which a single loop's lacks."""
    frame = frame.copy(deep=False)
    for name, value in (("arm", ""), ("seed", 0), ("split", "")):
        if name not in frame.columns:
            frame[name] = value
    return frame


def require_columns(frame: DataFrame, columns: Sequence[str], *, figure: str) -> None:
    """Check that a table has rows and these columns.

    Raises:
        UsageError: If a column is missing.
        EmptyDataError: If there is no row.
    """
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise UsageError(
            f"figure {figure!r} needs the columns {', '.join(columns)}, got a table "
            f"without {', '.join(missing)} (it has {', '.join(map(str, frame))}); "
            "join what is missing or rename it."
        )
    if frame.empty:
        raise EmptyDataError(
            f"figure {figure!r} needs at least one row, got an empty table with the "
            f"columns {', '.join(map(str, frame))}; check that the runs recorded it."
        )


def drawable(
    frame: DataFrame,
    columns: Sequence[str],
    *,
    figure: str,
    positive: Sequence[str] = (),
) -> tuple[DataFrame, int]:
    """Return the rows whose ``columns`` can be drawn, and how many cannot.

    Args:
        frame: The table.
        columns: Columns that must be finite.
        figure: Name for the error.
        positive: Columns that go on a log axis.

    Raises:
        EmptyDataError: If no row is left.
    """
    require_columns(frame, columns, figure=figure)
    keep = np.ones(len(frame), dtype=bool)
    for column in columns:
        values = pd.to_numeric(frame[column]).to_numpy(dtype=float, na_value=np.nan)
        keep &= np.isfinite(values)
        if column in positive:
            keep &= np.nan_to_num(values, nan=0.0) > 0
    if not keep.any():
        kind = "finite and positive" if positive else "finite"
        raise EmptyDataError(
            f"figure {figure!r} needs {kind} values of {', '.join(columns)}, got none "
            f"in {len(frame)} rows; check that the runs did not diverge and recorded "
            "these columns."
        )
    return frame.loc[keep].copy(), int((~keep).sum())


def left_out(count: int, what: str = "values") -> str:
    """Return the sentence for a caption, empty where nothing was left out."""
    if count == 0:
        return ""
    noun = what[:-1] if count == 1 else what
    verb = "is" if count == 1 else "are"
    why = "not finite, or not positive on a log axis"
    return f" Left out: {count} {noun} that {verb} {why}."


def quantity_values(
    frame: DataFrame,
    quantity: str,
    *,
    snapshots: Sequence[str],
    figure: str,
    variant: str | None = None,
) -> DataFrame:
    """Return arm, seed, snapshot, variant and ``value`` of one quantity.

    The table may be long (columns ``quantity`` and ``value``, as measurements are)
    or wide (a column of the quantity's name, as snapshots are). Of a quantity that
    was measured in several variants, such as two boxes of epsilon-sharpness, only
    one is returned: ``variant``, or the first in the table.

    Raises:
        EmptyDataError: If a snapshot has no value of the quantity.
        UsageError: If a seed has several values at one place.
    """
    wide = quantity in frame.columns
    columns = ["arm", "seed", "snapshot", *([] if wide else ["quantity", "value"])]
    require_columns(frame, columns, figure=figure)
    if wide:
        rows = frame.assign(value=frame[quantity])
    else:
        rows = frame[frame["quantity"] == quantity]
    rows = one_variant(rows, quantity, variant, figure=figure)
    rows = rows[rows["snapshot"].isin(snapshots)]
    absent = [name for name in snapshots if name not in set(rows["snapshot"])]
    if absent:
        known = ", ".join(sorted(set(frame["snapshot"].astype(str))))
        raise EmptyDataError(
            f"figure {figure!r} needs {quantity} at the snapshots "
            f"{', '.join(snapshots)}, got none at {', '.join(absent)} (snapshots in "
            f"the table: {known}); measure it there or name others."
        )
    place = ["arm", "seed", "snapshot"]
    twice = rows[rows.duplicated(place)]
    if len(twice):
        arm, seed, snapshot = twice.iloc[0][place]
        raise UsageError(
            f"figure {figure!r} needs one value of {quantity} per arm, seed and "
            f"snapshot, got several of arm {arm!r}, seed {seed}, at {snapshot!r}; "
            "drop the rows that should not count."
        )
    return rows[[*place, "variant", "value"]].reset_index(drop=True)


def one_variant(
    rows: DataFrame, quantity: str, variant: str | None, *, figure: str
) -> DataFrame:
    """Return the rows of one variant of a quantity, the first unless it is named.

    Raises:
        UsageError: If there is no such variant.
    """
    if "variant" not in rows.columns or rows.empty:
        return rows.assign(variant="")
    names = rows["variant"].fillna("").astype(str)
    wanted = names.iloc[0] if variant is None else variant
    if wanted not in set(names):
        known = ", ".join(map(repr, dict.fromkeys(names)))
        raise UsageError(
            f"figure {figure!r} needs the variant {variant!r} of {quantity}, got only "
            f"{known}; name one of these or measure it."
        )
    return rows.assign(variant=names)[names == wanted]


def shown_seeds(rows: DataFrame) -> DataFrame:
    """Return the rows of at most ``MOST_SEEDS`` seeds of each arm, evenly chosen.

    More marks hide each other and make a report of megabytes; means and tables are of
    all seeds.
    """
    shown = []
    for _, of_arm in rows.groupby("arm", sort=False):
        seeds = of_arm["seed"].unique()
        if len(seeds) > MOST_SEEDS:
            places = np.linspace(0, len(seeds) - 1, MOST_SEEDS).round().astype(int)
            of_arm = of_arm[of_arm["seed"].isin(seeds[places])]
        shown.append(of_arm)
    return pd.concat(shown)


def shown_words(rows: DataFrame) -> str:
    """Return the sentence for a caption where some seeds are not drawn."""
    most = int(rows.groupby("arm")["seed"].nunique().max())
    if most <= MOST_SEEDS:
        return ""
    return f" Of up to {most} seeds of an arm, {MOST_SEEDS} are drawn one by one."


def mean_interval(values: ArrayLike, *, log: bool = False) -> dict[str, float]:
    """Return the mean over seeds with its 95 % t-interval.

    With one value the interval's ends are NaN. With ``log`` all are on the log
    scale: the geometric mean.
    """
    array = np.asarray(values, dtype=float)
    array = np.log(array) if log else array
    n, mean = len(array), float(array.mean())
    low = high = math.nan
    if n > 1:
        stderr = float(array.std(ddof=1)) / math.sqrt(n)
        interval = Estimate(mean, stderr=stderr, dof=n - 1).interval(0.95)
        low, high = interval.low, interval.high
    back = math.exp if log else float
    return {"value": back(mean), "low": back(low), "high": back(high), "num_seeds": n}


def mean_curve(rows: DataFrame, *, at: Sequence[str], log: bool) -> DataFrame:
    """Return the mean over seeds with its interval at each place of one arm.

    Only where every seed of the arm has a value: a mean over the seeds that are
    still there would change its meaning along the curve.

    Args:
        rows: Columns ``seed``, ``value`` and those of ``at``.
        at: Columns that tell a place, such as epoch and update.
        log: Whether to average logarithms.
    """
    values = rows["value"].astype(float)
    rows = rows.assign(value=np.log(values) if log else values)
    places = rows.groupby(list(at), sort=True)
    table = places.agg(
        value=("value", "mean"), spread=("value", "std"), num_seeds=("seed", "size")
    )
    table = table[places["seed"].nunique() == rows["seed"].nunique()].reset_index()
    count = table["num_seeds"].to_numpy()
    quantile = np.full(len(count), math.nan)
    quantile[count > 1] = stdtrit(count[count > 1] - 1.0, 0.975)
    half = quantile * table["spread"] / np.sqrt(count)
    back = np.exp if log else np.asarray
    ends = {"low": table["value"] - half, "high": table["value"] + half}
    curves = {"value": table["value"], **ends}
    table = table.assign(**{name: back(curve) for name, curve in curves.items()})
    return table[[*at, "value", "low", "high", "num_seeds"]]
