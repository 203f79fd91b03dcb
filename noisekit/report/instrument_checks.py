"""Tables that check the instrument, or an interval by another way."""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from noisekit.core.results import Interval, Status
from noisekit.figures import snapshot_words
from noisekit.records import Runs
from noisekit.report.comparability import budget_snapshots, correct_answers
from noisekit.report.results import Table
from noisekit.stats import (
    Claim,
    claim_titles,
    common_grid,
    crossed_difference,
    hierarchical_bootstrap,
    kendall_tau,
    on_grid,
    paired_effect,
    permutation_band,
)

_ROUNDING = 1e-4
"""Of float32 sums: all that is left where a batch holds all examples."""
_FEWEST_RANKED = 4


def check_tables(runs: Runs, claims: Iterable[Claim]) -> Iterator[Table]:
    """Yield what can be checked: test error over images, PyHessian, rank correlation.

    A table of which nothing was recorded is left out.
    """
    budget = budget_snapshots(runs)[0]
    candidates = (
        Table(
            "test_error_over_images",
            image_error_table(runs, claims),
            "Test-error differences with 95 % intervals over seeds alone, and over "
            "seeds and images, given this split of the data. The wider of the first "
            "two, at the level of its claim, decides.",
        ),
        Table(
            "pyhessian",
            agreement_table(runs, "lambda_max", "lambda_max_pyhessian"),
            "PyHessian's largest eigenvalue of the same problem over ours, per arm: "
            "median and range over seeds.",
        ),
        Table(
            "rank_correlation",
            rank_table(runs, budget),
            f"Rank correlation with test error at {snapshot_words(budget)}, over all "
            "runs, with 95 % intervals. Runs share seeds and settings, so the "
            "intervals are too narrow; descriptive.",
        ),
    )
    yield from (table for table in candidates if len(table.frame))


def image_error_table(runs: Runs, claims: Iterable[Claim]) -> pd.DataFrame:
    """Return differences of error rates with intervals over seeds, and over images.

    One row a claim of which each image's outcome was recorded: the paired
    t-interval over seeds, the crossed analysis of seeds and images, and a bootstrap
    over both.
    """
    claims = tuple(claims)
    return pd.DataFrame(_image_error_rows(runs, claims))


def _image_error_rows(
    runs: Runs, claims: tuple[Claim, ...]
) -> Iterator[dict[str, object]]:
    titles = claim_titles(claims)
    for claim in claims:
        answers = correct_answers(runs, claim)
        if answers is None:
            continue
        errors = [1 - correct.mean(axis=1) for correct in answers]
        crossed = crossed_difference(*answers)
        resampled = hierarchical_bootstrap(*answers, generator=np.random.default_rng(0))
        yield {
            "claim": titles[claim.name],
            "difference [points]": f"{100 * crossed.value:+.2f}",
            "seeds": _in_points(paired_effect(*errors).interval()),
            "seeds and images, crossed": _in_points(crossed.interval()),
            "seeds and images, bootstrap": _in_points(resampled.interval),
            "seeds x images": " x ".join(map(str, answers[0].shape)),
        }


def agreement_table(runs: Runs, ours: str, theirs: str) -> pd.DataFrame:
    """Return a second measurement of the same quantity over the first, and their cost.

    Args:
        runs: The runs.
        ours: Quantity below the line.
        theirs: The same quantity by another program, above the line.
    """
    table = runs.measurements
    keys = ["run_id", "arm", "snapshot"]
    first, second = (
        table.loc[table["quantity"] == name, [*keys, "value", "num_matvecs"]]
        for name in (ours, theirs)
    )
    both = first.merge(second, on=keys, suffixes=("", "_other"))
    both["ratio"] = both["value_other"] / both["value"]
    return pd.DataFrame(
        {
            "snapshot": snapshot,
            "arm": arm,
            "ratio": f"{rows['ratio'].median():.5f} "
            f"({rows['ratio'].min():.5f} to {rows['ratio'].max():.5f})",
            "products, noisekit": f"{rows['num_matvecs'].median():.0f}",
            "products, other": f"{rows['num_matvecs_other'].median():.0f}",
        }
        for (snapshot, arm), rows in both.groupby(["snapshot", "arm"], sort=False)
    )


def norm_deviations(
    draws: pd.DataFrame, moments: pd.DataFrame, num_examples: int
) -> np.ndarray:
    """Return how many standard errors mean squared norms of drawn batches are off.

    Args:
        draws: Columns ``arm``, ``batch_size`` and ``grad_sq_norm``, a row a batch.
        moments: Columns ``arm``, ``grad_sq_norm`` and ``variance_trace`` of all
            examples, a row an arm.
        num_examples: Examples from which the batches were drawn.
    """
    truth = moments.set_index("arm")[["grad_sq_norm", "variance_trace"]].to_dict()
    far = []
    for (arm, _), rows in draws.groupby(["arm", "batch_size"]):
        norms, size = rows["grad_sq_norm"], int(rows["batch_size"].iloc[0])
        squared, variance = (truth[name][arm] for name in truth)
        wanted = expected_sq_norm(squared, variance, size, num_examples)
        stderr = norms.std() / np.sqrt(len(norms)) + _ROUNDING * wanted
        far.append(abs(norms.mean() - wanted) / stderr)
    return np.array(far)


def expected_sq_norm(
    grad_sq_norm: float, variance_trace: float, batch_size: int, num_examples: int
) -> float:
    """Return ``E|g_B|² = |g|² + (1 - B/N) tr Σ/B``, drawn without replacement."""
    left = 1 - batch_size / num_examples
    return float(grad_sq_norm + variance_trace * left / batch_size)


def curve_gap_table(
    runs: Runs,
    treatment: str,
    reference: str,
    *,
    quantities: Iterable[str] = ("train_loss", "test_error"),
) -> pd.DataFrame:
    """Return the largest gap between two arms' curves, and what chance gives.

    The mean difference over paired seeds along the epochs that all runs cover, of
    logarithms for losses, with the threshold that its largest absolute value exceeds
    in 5 % of exchanges of the arms within pairs.
    """
    rows = []
    for quantity in quantities:
        above, below = (
            _curves_by_seed(runs.evaluations, quantity, arm)
            for arm in (treatment, reference)
        )
        seeds = sorted(above.keys() & below.keys())
        if len(seeds) < 2:
            continue
        curves = [above[seed] for seed in seeds] + [below[seed] for seed in seeds]
        grid = common_grid([positions for positions, _ in curves])
        table = np.array([on_grid(*curve, grid) for curve in curves])
        band = permutation_band(
            table[: len(seeds)], table[len(seeds) :], generator=np.random.default_rng(0)
        )
        place = int(np.argmax(np.abs(band.difference)))
        rows.append(
            {
                "quantity": quantity,
                "scale": "log ratio" if _is_loss(quantity) else "difference",
                "largest gap": float(band.difference[place]),
                "at epoch": float(grid[place]),
                "5 % of exchanges exceed": band.threshold,
                "p": band.p_value,
                "pairs": len(seeds),
            }
        )
    return pd.DataFrame(rows)


def _curves_by_seed(
    evaluations: pd.DataFrame, quantity: str, arm: str
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return epochs and heights of each seed that has two points or more."""
    if quantity not in evaluations.columns:
        return {}
    columns = ["seed", "epoch", quantity]
    rows = evaluations.loc[evaluations["arm"] == arm, columns].dropna()
    rows = rows[rows[quantity] > 0] if _is_loss(quantity) else rows
    rows = rows.drop_duplicates(["seed", "epoch"]).sort_values(["seed", "epoch"])
    heights = rows[quantity].to_numpy(dtype=float)
    heights = np.log(heights) if _is_loss(quantity) else heights
    epochs = rows["epoch"].to_numpy(dtype=float)
    seeds, starts = np.unique(rows["seed"].to_numpy(), return_index=True)
    ends = [*starts[1:], len(rows)][: len(starts)]  # none where there are no rows
    return {
        int(seed): (epochs[start:end], heights[start:end])
        for seed, start, end in zip(seeds, starts, ends, strict=True)
        if end - start > 1
    }


def _is_loss(quantity: str) -> bool:
    return quantity.endswith("_loss")


def rank_table(
    runs: Runs, snapshot: str, *, against: str = "test_error"
) -> pd.DataFrame:
    """Return Kendall's tau of each measured quantity with an error, over all runs.

    Runs that share a seed or a setting are not independent, so the intervals are too
    narrow; nothing is judged by them.
    """
    there = runs.snapshots[runs.snapshots["snapshot"] == snapshot]
    errors = there.set_index("run_id")[against].dropna()
    measured = runs.measurements[runs.measurements["snapshot"] == snapshot]
    measured = measured[measured["quantity"] != against]
    rows = []
    for quantity, values in measured.groupby("quantity", sort=False):
        first = values.drop_duplicates("run_id").set_index("run_id")["value"].dropna()
        both = first.to_frame("value").join(errors.rename("error"), how="inner")
        if len(both) < _FEWEST_RANKED:
            continue
        tau = kendall_tau(both["value"], both["error"])
        if tau.status is Status.OK:
            ends = tau.interval()
            rows.append(
                {
                    "quantity": quantity,
                    "Kendall's tau": tau.tau,
                    "low": ends.low,
                    "high": ends.high,
                    "runs": tau.num_samples,
                }
            )
    return pd.DataFrame(rows)


def _in_points(ends: Interval) -> str:
    return f"[{100 * ends.low:+.2f}, {100 * ends.high:+.2f}]"
