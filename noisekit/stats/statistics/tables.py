"""Tidy tables of runs: groups by factors, values at snapshots, curves over training."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from noisekit.core.errors import UsageError

ALL = "*"
"""Stands for whatever factors the runs of a group differ in."""
_REDUCTIONS: Mapping[str, Callable[[NDArray[np.float64]], Any]] = {
    "mean": np.mean,
    "median": np.median,
    "max": np.max,
}
_POSITIONS = ("step", "examples_seen", "epoch")


class Tables(Protocol):
    """What a statistic reads: tidy tables with ``run_id``, ``arm`` and ``seed``.

    A set of runs that ``noisekit.open_runs`` opened has them, as has
    :class:`RunTables` for tables of one's own.
    """

    @property
    def runs(self) -> pd.DataFrame:
        """One row per run, with its factors and ``status``."""

    @property
    def snapshots(self) -> pd.DataFrame:
        """One row per run and snapshot, with losses and errors as columns."""

    @property
    def measurements(self) -> pd.DataFrame:
        """One row per run, snapshot, ``quantity`` and ``variant``, with ``value``."""

    @property
    def evaluations(self) -> pd.DataFrame:
        """One row per run and evaluation, with losses and errors as columns."""

    @property
    def steps(self) -> pd.DataFrame:
        """One row per run and reading of the probe."""


@dataclass(frozen=True)
class RunTables:
    """Tables of one's own, for statistics on runs that noisekit did not record.

    Attributes:
        runs: One row per run: ``run_id``, ``arm``, ``seed`` and the factors.
        snapshots: ``run_id``, ``snapshot`` and one column per quantity.
        measurements: ``run_id``, ``snapshot``, ``quantity``, ``value``.
        evaluations: ``run_id``, ``step`` or ``epoch``, and one column per quantity.
        steps: ``run_id``, ``step`` and one column per quantity.

    Example:
        >>> runs = pd.DataFrame({"run_id": ["a"], "arm": ["small"], "seed": [0]})
        >>> ends = pd.DataFrame(
        ...     {"run_id": ["a"], "snapshot": ["final"], "test_error": [0.1]}
        ... )
        >>> values_at(RunTables(runs, ends), "test_error", at="final")["value"].tolist()
        [0.1]
    """

    runs: pd.DataFrame
    snapshots: pd.DataFrame = field(default_factory=pd.DataFrame)
    measurements: pd.DataFrame = field(default_factory=pd.DataFrame)
    evaluations: pd.DataFrame = field(default_factory=pd.DataFrame)
    steps: pd.DataFrame = field(default_factory=pd.DataFrame)


def arms_named(
    group: str, arms: Iterable[str] | Mapping[str, Mapping[str, object]]
) -> tuple[str, ...]:
    """Return the arms of a group: one of that name, or all that fit.

    Arms of a grid are named by their factors, as in ``fork/order=1/batch_size=16``.
    A group names some of these parts, in any order: ``fork/batch_size=16`` is all such
    forks. A part ``factor=value`` also fits an arm that has the factor under another
    name, where factors are given. An empty group is all arms.

    Args:
        group: Name of an arm, or parts between slashes.
        arms: Names of the arms, or the factors of each.

    Example:
        >>> arms_named("fork/b=16", ["trunk", "fork/k=1/b=16", "fork/k=2/b=16"])
        ('fork/k=1/b=16', 'fork/k=2/b=16')
        >>> arms_named("b=16", {"small": {"b": 16}, "large": {"b": 128}})
        ('small',)
    """
    factors = arms if isinstance(arms, Mapping) else {name: {} for name in arms}
    if group in factors:
        return (group,)
    parts = group.split("/") if group else []
    return tuple(
        arm
        for arm, stated in factors.items()
        if all(_fits(part, arm.split("/"), stated) for part in parts)
    )


def _fits(part: str, names: Sequence[str], factors: Mapping[str, object]) -> bool:
    factor, equals, value = part.partition("=")
    if part in names:
        return True
    return bool(equals) and factor in factors and _is_value(factors[factor], value)


def _is_value(stated: object, text: str) -> bool:
    if isinstance(stated, bool) or not isinstance(stated, int | float | np.number):
        written = stated if isinstance(stated, str) else json.dumps(stated)
        return written.replace(" ", "") == text.replace(" ", "")
    try:
        return math.isclose(float(stated), float(text), rel_tol=1e-9)
    except ValueError:
        return False


def group_runs(tables: Tables, group: str) -> pd.DataFrame:
    """Return the rows of ``runs`` that belong to a group.

    Raises:
        UsageError: If there are none; the message lists the arms.
    """
    runs = tables.runs
    if not group:
        return runs
    arms = runs.drop_duplicates("arm").to_dict("records")
    factors = {str(row["arm"]): {str(k): v for k, v in row.items()} for row in arms}
    found = runs[runs["arm"].isin(arms_named(group, factors))]
    if not len(found):
        known = ", ".join(factors)
        raise UsageError(
            f"a statistic needs a group of runs, got {group!r}, which none belongs to; "
            f"arms are {known}. Write an arm, or factors as in 'plain/batch_size=512'."
        )
    return found


def values_at(
    tables: Tables,
    quantity: str,
    *,
    at: str,
    group: str = "",
    variant: str | None = None,
) -> pd.DataFrame:
    """Return one row per run of a group, with ``value`` of a quantity at a snapshot.

    NaN where the run has none: it diverged, or never reached the snapshot.

    Args:
        tables: The runs.
        quantity: A column of ``snapshots``, else measured.
        at: Name of the snapshot.
        group: Which runs; see :func:`arms_named`.
        variant: Which setting of the measure; the first recorded if left out.
    """
    runs = group_runs(tables, group)
    source = tables.snapshots
    if quantity in source.columns:
        rows = source.loc[source["snapshot"] == at, ["run_id", quantity]]
        rows = rows.rename(columns={quantity: "value"})
    else:
        rows = _measured(tables.measurements, quantity, variant)
        rows = rows.loc[rows["snapshot"] == at, ["run_id", "value"]]
    return runs.merge(rows.drop_duplicates("run_id"), on="run_id", how="left")


def _measured(table: pd.DataFrame, quantity: str, variant: str | None) -> pd.DataFrame:
    if "quantity" not in table.columns:
        return pd.DataFrame({"run_id": [], "snapshot": [], "value": []})
    rows = table[table["quantity"] == quantity]
    return rows if variant is None else rows[rows["variant"] == variant]


def curves(
    tables: Tables, quantity: str, *, group: str = "", x: str = "step"
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return positions and values of a quantity along each run, by run.

    Evaluations first, then readings of single updates, then what was measured at
    snapshots. Positions increase strictly, values are finite; a run without any is
    absent.

    Args:
        tables: The runs.
        quantity: A column of ``evaluations`` or ``steps``, else measured.
        group: Which runs.
        x: ``step``, ``examples_seen``, ``epoch``, or another quantity of the table.
    """
    wanted = group_runs(tables, group)["run_id"]
    for table in (tables.evaluations, tables.steps, _positioned(tables, quantity)):
        if not {"run_id", quantity, x} <= set(table.columns):
            continue
        order = next((name for name in _POSITIONS if name in table.columns), x)
        columns = list(dict.fromkeys(("run_id", order, x, quantity)))
        rows = table.loc[table["run_id"].isin(wanted), columns].dropna()
        rows = rows[np.isfinite(rows[quantity])]
        if len(rows):
            rows = rows.sort_values(["run_id", order], kind="stable")
            rows = rows.drop_duplicates(["run_id", order])
            return {
                str(run): (
                    part[x].to_numpy(dtype=float),
                    part[quantity].to_numpy(dtype=float),
                )
                for run, part in rows.groupby("run_id", sort=False)
            }
    return {}


def reduced_tail(
    tables: Tables,
    quantity: str,
    *,
    group: str = "",
    x: str = "step",
    tail: float = 0.25,
    reduce: str = "mean",
) -> pd.DataFrame:
    """Return one row per run of a group, with ``value`` over the last share of it.

    Args:
        tables: The runs.
        quantity: What is followed; see :func:`curves`.
        group: Which runs.
        x: What the share is one of.
        tail: Share of the run, from its end.
        reduce: ``mean``, ``median`` or ``max``.
    """
    take = _REDUCTIONS[reduce]
    lines = curves(tables, quantity, group=group, x=x)
    runs = group_runs(tables, group)
    return with_values(
        runs,
        {
            run: float(take(values[places >= (1 - tail) * places[-1]]))
            for run, (places, values) in lines.items()
        },
    )


def with_values(runs: pd.DataFrame, values: Mapping[str, float]) -> pd.DataFrame:
    """Return runs with a column ``value``: NaN where they diverged or have none."""
    found = runs["run_id"].astype(str).map(values).astype(float)
    if "status" in runs.columns:
        found = found.mask(runs["status"] == "diverged")
    return runs.assign(value=found)


def split_names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positioned(tables: Tables, quantity: str) -> pd.DataFrame:
    """Return measurements of a quantity with the place of their snapshot."""
    rows = _measured(tables.measurements, quantity, None)
    places = tables.snapshots
    keys = ["run_id", "snapshot"]
    if not len(rows) or not {*keys, "step"} <= {*places.columns, "step"}:
        return pd.DataFrame({"run_id": []})
    if {*keys, "step"} <= set(places.columns):
        there = places.drop_duplicates(keys)[[*keys, "step"]]
        rows = rows.merge(there, on=keys, how="left", suffixes=("", "_of_snapshot"))
        if "step_of_snapshot" in rows.columns:  # a row of a series has its own
            rows["step"] = rows["step"].fillna(rows["step_of_snapshot"])
    rows = rows.rename(columns={"value": quantity}).dropna(subset=["step"])
    for name in _POSITIONS[1:]:
        rows[name] = _interpolated(tables.evaluations, rows, name)
    return rows[["run_id", *_POSITIONS, quantity]]


def _interpolated(
    evaluations: pd.DataFrame, rows: pd.DataFrame, name: str
) -> "pd.Series[float]":
    """Return a position of rows that have a step, from evaluations around it."""
    found = pd.Series(np.nan, index=rows.index)
    if not {"run_id", "step", name} <= set(evaluations.columns):
        return found
    for run, part in rows.groupby("run_id"):
        known = evaluations[evaluations["run_id"] == run].sort_values("step")
        if len(known):
            found[part.index] = np.interp(part["step"], known["step"], known[name])
    return found


def one_per_seed(
    frame: pd.DataFrame, *, group: str, over: Sequence[str] = (), mean: str = "mean"
) -> dict[int, float]:
    """Return one value per seed: the mean over nested replicates, NaN if one lacks.

    Args:
        frame: ``run_id``, ``arm``, ``seed``, the factors and ``value``.
        group: Name of the group, for the message.
        over: Factors whose levels are replicates of one another.
        mean: ``"mean"``, or ``"geometric"``.

    Raises:
        UsageError: If a seed has several runs and nothing says over what.
    """
    names = [name for name in over if name != ALL]
    unknown = [name for name in names if name not in frame.columns]
    if unknown:
        raise UsageError(
            f"a statistic needs factors of the runs, got over={unknown[0]!r}; "
            f"they have {', '.join(factors_of(frame)) or 'none'}."
        )
    repeats = frame.groupby("seed").size()
    if not [*over] and (repeats > 1).any():
        arms = ", ".join(map(str, frame["arm"].drop_duplicates()))
        raise UsageError(
            f"a statistic needs one run per seed, got group {group!r} with "
            f"{int(repeats.max())} (arms {arms}); add factors to the group, as in "
            "'plain/batch_size=512', or average over a factor with over."
        )
    if not (repeats > 1).any():
        only = frame["value"].astype(float)
        return dict(zip(map(int, frame["seed"]), map(float, only), strict=True))
    found = {}
    for seed, rows in frame.groupby("seed"):
        values = rows["value"].to_numpy(dtype=float)
        found[int(str(seed))] = _average(values, mean)
    return found


def _average(values: NDArray[np.float64], mean: str) -> float:
    if values.size == 1:
        return float(values[0])  # exactly, not by way of its logarithm
    if mean != "geometric":
        return float(np.mean(values))
    logs = np.log(np.where(values > 0, values, np.nan))
    return float(np.exp(np.mean(logs)))


def factors_of(frame: pd.DataFrame) -> list[str]:
    """Return the columns of ``runs`` that are factors: all before ``run_id``."""
    columns = list(map(str, frame.columns))
    return columns[: columns.index("run_id")] if "run_id" in columns else []


def levels(frame: pd.DataFrame, factor: str) -> Sequence[float]:
    """Return the numbers of a factor, increasing.

    Raises:
        UsageError: If the runs have no such factor, or it is not of numbers.
    """
    if factor not in frame.columns:
        raise UsageError(
            f"a statistic over {factor!r} needs runs that differ in it, got factors "
            f"{', '.join(factors_of(frame)) or 'none'}."
        )
    numbers = pd.to_numeric(frame[factor], errors="coerce")
    if numbers.isna().any():
        raise UsageError(
            f"a statistic over {factor!r} needs numbers, got "
            f"{frame.loc[numbers.isna(), factor].iloc[0]!r}."
        )
    return sorted({float(number) for number in numbers})
