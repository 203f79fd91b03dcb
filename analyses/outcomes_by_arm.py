"""How did each arm end, beside the statistics of the paper?
=========================================================

Reads the runs of ``small_vs_large_batch`` (any profile) and describes them with the
statistics of Keskar et al. 2017: accuracy (table 2), epsilon-sharpness (tables 3 and
4), curves (figure 2), the straight line between two solutions (figure 3) and the
distance from the start. Nothing here is judged; the contrasts are in
``sharpness_vs_batch_size``.

Run it with ``noisekit analyse outcomes_by_arm DIR``.
"""

# %%
# What is read
# ------------
# Snapshots at equal epochs, at equal updates, where training stalled, and at its end.

from collections.abc import Iterator

import pandas as pd

import noisekit as nk
from noisekit import figures, report

QUESTION = "How did each arm end, beside the statistics of the paper?"


def analyse(runs: nk.Runs) -> report.AnalysisResult:
    """Return figures and tables of a set of runs."""
    return report.AnalysisResult(
        name="outcomes_by_arm",
        question=QUESTION,
        answer=answer(runs),
        plots=tuple(plots(runs)),
        tables=tuple(tables(runs)),
    )


def answer(runs: nk.Runs) -> str:
    """Return what each arm's test accuracy was at each budget, in a sentence."""
    told = [
        f"{snapshot.replace('_', ' ')} " + ", ".join(arm_words(runs, snapshot))
        for snapshot in report.budget_snapshots(runs)
    ]
    return (
        f"Test accuracy, mean ± standard deviation over seeds: at {'; at '.join(told)}."
    )


def arm_words(runs: nk.Runs, snapshot: str) -> Iterator[str]:
    """Yield each arm's test accuracy at a snapshot."""
    for arm, here in at_snapshot(runs, snapshot):
        yield f"{spread(100 * (1 - here['test_error']))} % ({arm.replace('_', ' ')})"


# %%
# Figures
# -------


def plots(runs: nk.Runs) -> Iterator[figures.Plot]:
    """Yield the curves and the line between two solutions."""
    styles = figures.arm_styles(runs.runs)
    yield figures.training_curves(runs.evaluations, styles=styles)
    yield figures.linear_path(line_between(runs))


# %%
# The straight line between two solutions
# ---------------------------------------
# Alpha 0 is the small batch, 1 the large one. A valley that looks narrow may belong to
# small weights: the line says nothing of scale, so the weight norm stands in the table.


def line_between(runs: nk.Runs) -> pd.DataFrame:
    """Return losses and errors on training and test data along the line, per seed."""
    small, large = extreme_arms(runs)
    snapshot = end_snapshot(runs, (small, large))
    ends = runs.snapshots.query("snapshot == @snapshot").pivot(
        index="seed", columns="arm", values="run_id"
    )
    rows = []
    for seed, (start, end) in ends[[small, large]].dropna().iterrows():
        first = nk.revisit(runs, start, snapshot)
        second = nk.revisit(runs, end, snapshot)
        for split in ("train", "test"):
            line = nk.interpolate(
                first.model,
                first.loss_fn,
                first.batches(split),
                start=first.model.state_dict(),
                end=second.model.state_dict(),
                bn=first.bn_along_a_line,
            )
            rows.append(line.frame().assign(seed=seed, split=split))
    return pd.concat(rows, ignore_index=True)


def extreme_arms(runs: nk.Runs) -> tuple[str, str]:
    """Return the first arms of the recipe with the smallest and the largest batch."""
    sizes = runs.runs.drop_duplicates("arm").set_index("arm")["batch_size"]
    return str(sizes.idxmin()), str(sizes.idxmax())


def end_snapshot(runs: nk.Runs, arms: tuple[str, str]) -> str:
    """Return where both arms count as trained: stalled if all seeds are, else last."""
    table = runs.snapshots
    table = table[table["arm"].isin(arms) & (table["snapshot"] == "stalled")]
    complete = len(table) == len(arms) * runs.runs["seed"].nunique()
    return "stalled" if complete else "final"


# %%
# Tables
# ------
# Accuracy and epsilon-sharpness as in the paper's tables 2 to 4, the paper's own
# numbers beside ours. The paper trained on MNIST; its numbers show the size of the
# effect that it reported and are not what our contrasts test.

PAPER = pd.DataFrame(
    [
        ("F1, MNIST", "train accuracy [%]", "99.66 ± 0.05", "99.92 ± 0.01"),
        ("F1, MNIST", "test accuracy [%]", "98.03 ± 0.07", "97.81 ± 0.07"),
        ("F1, MNIST", "full space, ε=0.001", "1.23 ± 0.83", "205.14 ± 69.52"),
        ("F1, MNIST", "full space, ε=0.0005", "0.61 ± 0.27", "42.90 ± 17.14"),
        ("F1, MNIST", "100 dimensions, ε=0.001", "0.11 ± 0.00", "9.22 ± 0.56"),
        ("F1, MNIST", "100 dimensions, ε=0.0005", "0.05 ± 0.00", "9.17 ± 0.14"),
    ],
    columns=["paper's network", "statistic", "small batch", "large batch"],
)


def tables(runs: nk.Runs) -> Iterator[report.Table]:
    """Yield the tables, those of the paper first."""
    yield report.Table(
        "accuracy",
        accuracy_table(runs),
        "Accuracy per arm, mean ± standard deviation over seeds (Keskar's table 2).",
    )
    if "epsilon_sharpness" in set(runs.measurements["quantity"]):
        yield report.Table(
            "epsilon_sharpness",
            epsilon_table(runs),
            "Epsilon-sharpness in percent with its first-order share: how much of it "
            "is slope (Keskar's tables 3 and 4). A lower bound of the maximum.",
        )
        yield report.Table(
            "keskar_2017",
            PAPER,
            "The paper's own numbers for its fully connected network: another data "
            "set, and not what is tested here.",
        )
    yield report.Table(
        "distance",
        distance_table(runs),
        "Weight norm and distance from the start, mean ± standard deviation. Keskar "
        "et al. report that the small batch ends 3 to 10 times further away.",
    )


def accuracy_table(runs: nk.Runs) -> pd.DataFrame:
    """Return train and test accuracy in percent per arm, at each budget."""
    rows = []
    for snapshot in (*report.budget_snapshots(runs), "stalled", "final"):
        for arm, here in at_snapshot(runs, snapshot):
            rows.append(
                {
                    "snapshot": snapshot,
                    "arm": arm,
                    "train accuracy [%]": spread(100 * (1 - here["train_error"])),
                    "test accuracy [%]": spread(100 * (1 - here["test_error"])),
                    "training loss": spread(here["train_loss"]),
                    "updates": spread(here["step"]),
                }
            )
    return pd.DataFrame(rows).drop_duplicates(["snapshot", "arm"], ignore_index=True)


def distance_table(runs: nk.Runs) -> pd.DataFrame:
    """Return weight norm and distance from the start per arm, at each budget."""
    return pd.DataFrame(
        {
            "snapshot": snapshot,
            "arm": arm,
            "weight norm": spread(here["weight_norm"]),
            "distance from start": spread(here["distance_from_start"]),
        }
        for snapshot in dict.fromkeys((*report.budget_snapshots(runs), "final"))
        for arm, here in at_snapshot(runs, snapshot)
    )


def at_snapshot(runs: nk.Runs, snapshot: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each arm's rows of a snapshot, in the order of the arms."""
    table = runs.snapshots[runs.snapshots["snapshot"] == snapshot]
    for arm in runs.runs["arm"].drop_duplicates():
        here = table[table["arm"] == arm]
        if len(here):
            yield str(arm), here


def spread(values: "pd.Series[float]") -> str:
    """Write mean and standard deviation over seeds."""
    deviation = values.std(ddof=1) if len(values) > 1 else float("nan")
    return f"{values.mean():.4g} ± {deviation:.2g}"


def epsilon_table(runs: nk.Runs) -> pd.DataFrame:
    """Return epsilon-sharpness per snapshot, arm and variant of the box."""
    table = runs.measurements
    shares = table[table["quantity"] == "first_order_share"]
    found = table[table["quantity"] == "epsilon_sharpness"].merge(
        shares[["run_id", "snapshot", "variant", "value"]],
        on=["run_id", "snapshot", "variant"],
        how="left",
        suffixes=("", "_share"),
    )
    return pd.DataFrame(
        {
            "snapshot": snapshot,
            "box": variant,
            "arm": arm,
            "φ [%]": spread(rows["value"]),
            "first-order share": spread(rows["value_share"]),
        }
        for (snapshot, variant, arm), rows in found.groupby(
            ["snapshot", "variant", "arm"], sort=False
        )
    )
