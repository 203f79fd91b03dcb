"""Which base rate does the rule choose, on validation data alone?
===============================================================

Reads the runs of the profile ``tuning`` of ``small_vs_large_batch``: other seeds than
those that are judged, a grid of rates at both batch sizes. The rule was stated before:
at the smaller batch, the rate with the lowest validation error among those of which
eight times still trains there.

Run it with ``noisekit analyse rate_choice DIR``.
"""

# %%
# What is read
# ------------
# Each run at the end of its budget; a run that diverged has no error and rules its
# rate out.

from collections.abc import Iterator

import pandas as pd

import noisekit as nk
from noisekit import figures, report

QUESTION = "Which base rate does the rule choose, on validation data alone?"
FACTOR = 8
TRAINED = 0.05


def analyse(runs: nk.Runs) -> report.AnalysisResult:
    """Return the rate that the rule chooses, with the grid that it chose from."""
    grid = outcomes(runs)
    batch_size = int(grid["batch_size"].min())
    rate = base_rate(grid[grid["batch_size"] == batch_size])
    return report.AnalysisResult(
        name="rate_choice",
        question=QUESTION,
        answer=answer(batch_size, rate, runs),
        plots=tuple(plots(grid, batch_size, rate)),
        tables=(
            report.Table(
                "grid",
                averages(grid),
                "Means over the tuning seeds at the end of training; empty where a run "
                "diverged.",
            ),
        ),
    )


def outcomes(runs: nk.Runs) -> pd.DataFrame:
    """Return one row per run: its factors and how it ended, empty if it diverged."""
    ends = runs.snapshots[runs.snapshots["snapshot"] == "final"]
    columns = ["run_id", "train_loss", "validation_error"]
    factors = runs.runs[["run_id", "batch_size", "learning_rate", "seed", "status"]]
    grid = factors.merge(ends[columns], on="run_id", how="left")
    diverged = grid["status"] != "done"
    grid.loc[diverged, ["train_loss", "validation_error"]] = float("nan")
    return grid


# %%
# The rule
# --------


def base_rate(grid: pd.DataFrame) -> float | None:
    """Return the rate that the rule chooses at one batch size, if there is one."""
    by_rate = grid.groupby("learning_rate")
    trains = by_rate["train_loss"].apply(lambda losses: bool((losses < TRAINED).all()))
    errors = by_rate["validation_error"].mean()
    allowed = [
        rate
        for rate in errors.index
        if any(abs(high / rate - FACTOR) < 1e-6 for high in trains[trains].index)
    ]
    return float(errors[allowed].idxmin()) if allowed else None


def answer(batch_size: int, rate: float | None, runs: nk.Runs) -> str:
    """Return what the rule chose, in a sentence."""
    seeds = sorted(int(seed) for seed in runs.runs["seed"].unique())
    basis = (
        f"by validation error at batch {batch_size} over {len(seeds)} tuning seeds "
        f"({seeds[0]} to {seeds[-1]})"
    )
    if rate is None:
        return (
            f"The rule chooses no rate: {FACTOR} times none of the grid still trains."
        )
    return f"The rule chooses a base rate of {rate:g}, {basis}. No test data were used."


# %%
# The grid
# --------


def plots(
    grid: pd.DataFrame, batch_size: int, rate: float | None
) -> Iterator[figures.Plot]:
    """Yield the grid with the choice marked."""
    chosen = {} if rate is None else {batch_size: rate}
    yield figures.rate_tuning(grid, chosen=chosen)


def averages(grid: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds per batch size and rate."""
    by_cell = grid.groupby(["batch_size", "learning_rate"])
    means = by_cell[["train_loss", "validation_error"]].agg(
        lambda values: values.mean(skipna=False)
    )
    return means.reset_index()
