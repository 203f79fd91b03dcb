"""Do large batches find sharper minima, and what else explains it?
================================================================

Reads the runs of ``small_vs_large_batch`` (any profile) and answers with the contrasts
that the recipe fixed before they began. Beside them, without a verdict, stand measures
that a rescaling of the weights leaves alone, and two checks of the instrument: a
rescaled twin of one minimum, and PyHessian's eigenvalue of the same problem.

Run it with ``noisekit analyse sharpness_vs_batch_size DIR``.
"""

# %%
# What is read
# ------------
# One row per run, snapshot and quantity. Every network of an arm and a seed was kept
# at fixed epochs, fixed updates and fixed training losses; sharpness is compared only
# where the losses match, since the curvature of cross-entropy fades with the loss.

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

import noisekit as nk
from noisekit import figures, report, stats

DESCRIPTIVE = (
    "hessian_trace",
    "weighted_hessian_trace",
    "gauge_fixed_lambda_max",
    "epsilon_sharpness",
    "edge_of_stability_ratio",
    "simple_noise_scale",
    "weight_norm",
    "distance_from_start",
)
TWIN_FACTOR = 4.0


def analyse(runs: nk.Runs) -> report.AnalysisResult:
    """Return figures, tables and verdicts for a set of runs."""
    contrasts = report.stated_contrasts(runs)
    results = stats.judge(
        contrasts,
        report.paired_samples(runs, contrasts),
        claims=bool(runs.recipe.get("claims")),
    )
    return report.AnalysisResult(
        name="sharpness_vs_batch_size",
        question=str(runs.recipe.get("question", "")),
        answer=answer(runs, results),
        rules=report.fair_test_rules(runs, contrasts),
        contrasts=tuple(results),
        plots=tuple(plots(runs, results)),
        tables=tuple(tables(runs, contrasts)),
        warnings=tuple(warnings(runs)),
    )


# %%
# The answer in one sentence
# --------------------------
# It is put together from the verdicts by rule. Where the sharpness could not be
# compared it says so, and it never speaks of causes.

WENT = {
    stats.Verdict.LARGER: "went up",
    stats.Verdict.SMALLER: "went down",
    stats.Verdict.EQUIVALENT: "did not go",
    stats.Verdict.NOT_RESOLVED: "may go",
}


NAMES = {
    "fashion-mnist": "Fashion-MNIST",
    "mnist": "MNIST",
    "mlp": "MLP",
    "f1": "F1",
    "small_cnn": "CNN",
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
}
AT = {
    "lambda_max_at_equal_epochs": "at equal epochs",
    "lambda_max_at_equal_updates": "at equal updates",
    "lambda_max_at_equal_loss": "at equal training loss",
    "gauge_fixed_lambda_max_at_equal_loss": "at equal training loss with the rows "
    "before BatchNorm at unit norm",
    "lambda_max_at_equal_rate_per_example": "at equal rate per example",
}
JUDGED = {
    "lambda_max_at_equal_loss": "once loss was matched",
    "gauge_fixed_lambda_max_at_equal_loss": "once loss and row norms were matched",
    "lambda_max_at_equal_rate_per_example": "at equal rate per example",
}


def answer(runs: nk.Runs, results: Sequence[stats.ContrastResult]) -> str:
    """Return the sentence that the verdicts make."""
    found = {result.contrast.name: result for result in results}
    if not runs.recipe.get("claims"):
        return "No verdict: this profile shows that everything runs and claims nothing."
    told = [name for name in AT if name in found]
    if not told:
        return " ".join(r.describe() for r in results if r.contrast.primary)
    contrast = found[told[0]].contrast
    small, large = (
        f"batch {factor(runs, arm, 'batch_size'):g}"
        for arm in (contrast.reference, contrast.treatment)
    )
    ratios = [f"{times(found[name])}{{}} {AT[name]}" for name in told]
    ratios = [ratios[0].format(f" {small}'s"), *(r.format("") for r in ratios[1:])]
    error = found.get("test_error_at_equal_epochs")
    errors = (
        f"; test error differed by {points(error)} at equal epochs" if error else ""
    )
    return (
        f"On {setting(runs)}, {large}'s largest Hessian eigenvalue was "
        f"{', '.join(ratios)}{errors}. {conclusion(found)}"
    )


def conclusion(found: dict[str, stats.ContrastResult]) -> str:
    """Return what the primary verdicts on matched losses say, and what they cannot."""
    judged = [name for name in JUDGED if name in found and found[name].contrast.primary]
    says = [
        f"{movement(found[name])} with batch size {JUDGED[name]}" for name in judged
    ]
    caveat = "these runs cannot say whether sharpness causes the error."
    if not says:
        return f"No contrast of sharpness was primary; {caveat}"
    margin = found[judged[0]].contrast.margin
    return (
        f"So here, by a margin of {margin:g} times, sharpness {' and '.join(says)}; "
        f"{caveat}"
    )


def movement(result: stats.ContrastResult) -> str:
    """Return the verb for a verdict."""
    return WENT.get(result.verdict, "could not be compared")


def times(result: stats.ContrastResult) -> str:
    """Write a ratio with its 95 % interval."""
    ends = result.interval
    low, effect, high = (
        f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
        for value in (ends.low, result.effect, ends.high)
    )
    return f"{effect} times [{low}, {high}]"


def points(result: stats.ContrastResult) -> str:
    """Write a difference of error rates in percentage points, with its interval."""
    return f"{100 * result.effect:+.2f} points {in_points(result.interval)}"


def setting(runs: nk.Runs) -> str:
    """Write data, network, optimiser and seeds in a few words."""
    recipe = runs.recipe
    size = sum(value.size for value in runs.weights(first_run(runs), "start").values())
    seeds = runs.runs["seed"].nunique()
    data, model, optimizer = (
        NAMES.get(recipe[section]["name"], recipe[section]["name"])
        for section in ("data", "model", "optimizer")
    )
    return (
        f"{data} ({size / 1000:.0f}k-parameter {model}, {optimizer}, one split, "
        f"{seeds} seeds)"
    )


def first_run(runs: nk.Runs) -> str:
    """Return the name of the first run."""
    return str(runs.runs["run_id"].iloc[0])


def factor(runs: nk.Runs, arm: str, name: str) -> float:
    """Return what an arm sets a factor to."""
    table = runs.runs
    return float(table.loc[table["arm"] == arm, name].iloc[0])


# %%
# Figures
# -------
# The contrasts; sharpness against training loss (Keskar's figure 6), with the rate's
# own limit of stability; each seed of each arm; and what else differs between the arms.


def plots(
    runs: nk.Runs, results: Sequence[stats.ContrastResult]
) -> Iterator[figures.Plot]:
    """Yield the figures, the most telling first."""
    styles = figures.arm_styles(runs.runs)
    if results:
        yield figures.contrast_forest(results)
    yield figures.sharpness_against_loss(
        runs.measurements,
        runs.snapshots,
        styles=styles,
        thresholds=stability_limits(runs),
    )
    for contrast in sharpness_contrasts(results):
        if snapshots := matched_snapshots(runs, contrast.quantity):
            yield figures.paired_arms(
                runs.measurements,
                contrast.quantity,
                snapshots=snapshots,
                styles=styles,
                name=f"paired_{contrast.quantity}",
            )
    yield figures.paired_arms(
        runs.snapshots,
        "test_error",
        snapshots=report.budget_snapshots(runs),
        scale="linear",
        styles=styles,
        name="paired_test_error",
    )
    ratios = ratio_table(runs, results)
    if len(ratios):
        yield figures.descriptive_ratios(ratios)


def stability_limits(runs: nk.Runs) -> dict[str, float] | None:
    """Return 2/rate per arm where plain gradient descent has that limit."""
    optimizer = runs.recipe.get("optimizer", {})
    plain = optimizer.get("name") == "sgd" and not optimizer.get("momentum")
    if not plain or "learning_rate" not in runs.runs.columns:
        return None
    return {
        arm: 2 / factor(runs, arm, "learning_rate") for arm in runs.runs["arm"].unique()
    }


def sharpness_contrasts(
    results: Sequence[stats.ContrastResult],
) -> list[stats.Contrast]:
    """Return the first contrast of each sharpness measure."""
    first: dict[str, stats.Contrast] = {}
    for result in results:
        if report.fades_with_loss(result.contrast.quantity):
            first.setdefault(result.contrast.quantity, result.contrast)
    return list(first.values())


def matched_snapshots(runs: nk.Runs, quantity: str) -> list[str]:
    """Return the lowest loss at which every arm was measured, and the equal budgets."""
    table = runs.measurements
    table = table[table["quantity"] == quantity]
    arms = runs.runs["arm"].nunique()
    everywhere = table.groupby("snapshot")["arm"].nunique() == arms
    names = set(everywhere[everywhere].index)
    losses = [name for name in names if name.startswith("loss_")]
    losses.sort(key=lambda name: float(name.removeprefix("loss_")))
    return [
        *reversed(losses[:2]),
        *(n for n in report.budget_snapshots(runs) if n in names),
    ]


def ratio_table(runs: nk.Runs, results: Sequence[stats.ContrastResult]) -> pd.DataFrame:
    """Return each descriptive measure as a ratio of the arms, at matched loss."""
    tables = [pd.DataFrame()]
    for contrast in compared_pairs(results):
        arms = (contrast.treatment, contrast.reference)
        for source, there in (
            (runs.measurements, measured_in(runs, arms, contrast.snapshot)),
            (runs.snapshots, kept_in(runs, arms, contrast.snapshot)),
        ):
            if there:
                ratios = figures.paired_ratios(
                    source,
                    quantities=there,
                    snapshot=contrast.snapshot,
                    treatment=contrast.treatment,
                    reference=contrast.reference,
                    comparison=contrast.description or contrast.name,
                )
                tables.append(ratios)
    return pd.concat(tables, ignore_index=True)


def measured_in(runs: nk.Runs, arms: tuple[str, str], snapshot: str) -> list[str]:
    """Return the descriptive measures that both arms have at a snapshot."""
    table = runs.measurements
    table = table[table["arm"].isin(arms) & (table["snapshot"] == snapshot)]
    both = table.dropna(subset="value").groupby("quantity")["arm"].nunique() == len(
        arms
    )
    return [name for name in DESCRIPTIVE if both.get(name, False)]


def kept_in(runs: nk.Runs, arms: tuple[str, str], snapshot: str) -> list[str]:
    """Return the descriptive columns of the snapshots, if both arms reached it."""
    table = runs.snapshots
    table = table[table["arm"].isin(arms) & (table["snapshot"] == snapshot)]
    reached = table["arm"].nunique() == len(arms)
    return [name for name in DESCRIPTIVE if reached and name in table.columns]


def compared_pairs(results: Sequence[stats.ContrastResult]) -> list[stats.Contrast]:
    """Return one sharpness contrast for each pair of arms, at matched loss if any."""
    pairs: dict[tuple[str, str], stats.Contrast] = {}
    for result in results:
        contrast = result.contrast
        if report.fades_with_loss(contrast.quantity):
            key = (contrast.treatment, contrast.reference)
            if key not in pairs or contrast.snapshot.startswith("loss_"):
                pairs.setdefault(key, contrast)
    return list(pairs.values())


# %%
# Two checks beside the verdicts
# ------------------------------
# The intervals above average over seeds. Test error also depends on which images were
# drawn, so it is resampled over both. PyHessian's eigenvalue stands beside ours.


def tables(
    runs: nk.Runs, contrasts: Sequence[stats.Contrast]
) -> Iterator[report.Table]:
    """Yield the tables."""
    image_errors = list(image_interval_rows(runs, contrasts))
    if image_errors:
        yield report.Table(
            "test_error_over_images",
            pd.DataFrame(image_errors),
            "Test-error differences with their error over seeds and over images: the "
            "interval given this split of the data.",
        )
    check = pyhessian_table(runs)
    if len(check):
        yield report.Table(
            "pyhessian",
            check,
            "PyHessian's largest eigenvalue of the same problem over ours, per arm: "
            "median and range over seeds.",
        )


def image_interval_rows(
    runs: nk.Runs, contrasts: Sequence[stats.Contrast]
) -> Iterator[dict[str, object]]:
    """Yield each test-error contrast with its interval over seeds and images."""
    for contrast in contrasts:
        if contrast.quantity != "test_error":
            continue
        correct = [
            correct_matrix(runs, arm, contrast.snapshot)
            for arm in (contrast.treatment, contrast.reference)
        ]
        if any(matrix.size == 0 for matrix in correct):
            continue
        crossed = stats.crossed_difference(*correct)
        resampled = stats.hierarchical_bootstrap(
            *correct, generator=np.random.default_rng(0)
        )
        yield {
            "contrast": contrast.name,
            "difference [points]": f"{100 * crossed.value:+.2f}",
            "95 %, crossed analysis": in_points(crossed.interval()),
            "95 %, bootstrap": in_points(resampled.interval),
            "seeds x images": " x ".join(map(str, correct[0].shape)),
        }


def in_points(ends: nk.Interval) -> str:
    """Write an interval of error rates in percentage points."""
    return f"[{100 * ends.low:+.2f}, {100 * ends.high:+.2f}]"


def correct_matrix(runs: nk.Runs, arm: str, snapshot: str) -> np.ndarray:
    """Return whether each test image is right, seeds by images."""
    table = runs.examples
    rows = table[
        (table["arm"] == arm)
        & (table["snapshot"] == snapshot)
        & (table["split"] == "test")
    ]
    wide = rows.pivot(index="seed", columns="example", values="correct")
    return wide.dropna().to_numpy(dtype=bool)


def pyhessian_table(runs: nk.Runs) -> pd.DataFrame:
    """Return PyHessian's eigenvalue over ours, and what either cost."""
    table = runs.measurements
    keys = ["run_id", "arm", "snapshot"]
    ours, theirs = (
        table.loc[table["quantity"] == name, [*keys, "value", "num_matvecs"]]
        for name in ("lambda_max", "lambda_max_pyhessian")
    )
    both = ours.merge(theirs, on=keys, suffixes=("", "_pyhessian"))
    both["ratio"] = both["value_pyhessian"] / both["value"]
    return pd.DataFrame(
        {
            "snapshot": snapshot,
            "arm": arm,
            "PyHessian / noisekit": f"{rows['ratio'].median():.5f} "
            f"({rows['ratio'].min():.5f} to {rows['ratio'].max():.5f})",
            "products, noisekit": f"{rows['num_matvecs'].median():.0f}",
            "products, PyHessian": f"{rows['num_matvecs_pyhessian'].median():.0f}",
        }
        for (snapshot, arm), rows in both.groupby(["snapshot", "arm"], sort=False)
    )


# %%
# A warning that belongs to every number above
# --------------------------------------------
# Scaling one layer of a ReLU network up and the next one down leaves every prediction
# as it is and changes the largest eigenvalue as one likes (Dinh et al. 2017). The twin
# below is one of the networks measured above.


def warnings(runs: nk.Runs) -> Iterator[str]:
    """Yield what a reader must know before using the numbers."""
    yield from runs.faults
    run_id = first_run(runs)
    net = nk.revisit(runs, run_id, "final")
    twin = nk.rescaled_twin(
        net.model,
        net.loss_fn,
        net.batches("train"),
        factor=TWIN_FACTOR,
        generator=torch.Generator().manual_seed(0),
    )
    yield (
        f"A rescaled twin of {run_id}: the same predictions (outputs agree to "
        f"{max(twin.output_change, 1e-16):.0e}), so the same loss and the same test "
        f"error, and a largest Hessian eigenvalue of {twin.twin_lambda_max.value:.4g} "
        f"instead of {twin.lambda_max.value:.4g}. Raw sharpness is not a property of "
        "the function."
    )
