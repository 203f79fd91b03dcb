"""Which base rate does the rule choose, on validation data alone?
===============================================================

Reads a grid of learning rates, such as the runs of the profile ``tuning`` of
``small_vs_large_batch``: other seeds than those that are judged. The rule: at the
smallest batch, the rate with the lowest validation error among those of which the
multiple with the same rate per example still trains at the largest batch size's factor.

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
TRAINED = 0.05  # a training loss that counts as trained


def analyse(runs: nk.Runs) -> report.AnalysisResult:
    """Return the rate that the rule chooses, with the grid that it chose from."""
    grid = outcomes(runs)
    sizes = sorted(grid["batch_size"].unique())
    factor = sizes[-1] / sizes[0]
    rate = base_rate(grid[grid["batch_size"] == sizes[0]], factor)
    return report.AnalysisResult(
        name="rate_choice",
        question=QUESTION,
        answer=answer(sizes[0], rate, factor, runs),
        plots=tuple(plots(grid, sizes[0], rate)),
        tables=(
            report.Table(
                "grid",
                averages(grid),
                "Means over the seeds at the end of training; empty where a run "
                "diverged.",
            ),
        ),
        warnings=tuple(warnings(runs)),
    )


def outcomes(runs: nk.Runs) -> pd.DataFrame:
    """Return one row per run: its factors and how it ended, empty if it diverged."""
    ends = runs.snapshots[runs.snapshots["snapshot"] == "final"]
    columns = ["run_id", "train_loss", "validation_error"]
    grid = runs.runs[["run_id", "seed", "status"]].merge(
        ends[columns], on="run_id", how="left"
    )
    grid["batch_size"] = report.run_settings(runs, "training.batch_size")
    grid["learning_rate"] = report.run_settings(runs, "optimizer.learning_rate")
    diverged = grid["status"] != "done"
    grid.loc[diverged, ["train_loss", "validation_error"]] = float("nan")
    return grid


def warnings(runs: nk.Runs) -> Iterator[str]:
    """Yield why these runs should not choose a rate, if so."""
    yield from runs.faults
    if report.gives_verdicts(runs):
        yield (
            "These runs carry verdicts. A rate chosen on the seeds that are judged "
            "makes the comparison unfair; choose it on runs of other seeds."
        )


# %%
# The rule
# --------


def base_rate(grid: pd.DataFrame, factor: float) -> float | None:
    """Return the rate that the rule chooses at one batch size, if there is one."""
    by_rate = grid.groupby("learning_rate")
    trains = by_rate["train_loss"].apply(lambda losses: bool((losses < TRAINED).all()))
    errors = by_rate["validation_error"].mean()
    allowed = [
        rate
        for rate in errors.index
        if any(abs(high / rate - factor) < 1e-6 for high in trains[trains].index)
    ]
    return float(errors[allowed].idxmin()) if allowed else None


def answer(batch_size: int, rate: float | None, factor: float, runs: nk.Runs) -> str:
    """Return what the rule chose, in a sentence."""
    seeds = sorted(int(seed) for seed in runs.runs["seed"].unique())
    if rate is None:
        return (
            f"The rule chooses no rate: of no rate in the grid does {factor:g} times "
            f"reach a training loss below {TRAINED:g} at batch {batch_size:g}."
        )
    noun = "seed" if len(seeds) == 1 else "seeds"
    return (
        f"The rule chooses a base rate of {rate:g}, by validation error at batch "
        f"{batch_size:g} over {len(seeds)} {noun} ({seeds[0]} to {seeds[-1]}). No test "
        "data were used."
    )


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
