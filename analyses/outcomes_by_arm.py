"""How did each arm end, beside the statistics of the paper?
=========================================================

Describes any set of runs with the statistics of Keskar et al. 2017: accuracy (table 2),
epsilon-sharpness (tables 3 and 4), curves (figure 2), the straight line between two
solutions (figure 3) and the distance from the start. Nothing here is judged.

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


LISTED = 6
"""Arms of which each is in the answer; of more, the best and the worst are."""


def analyse(runs: nk.Runs) -> report.AnalysisResult:
    """Return figures and tables of a set of runs."""
    styles = figures.arm_styles(runs.runs)
    labels = {arm: style.label for arm, style in styles.items()}
    pair = report.extreme_arms(runs)
    return report.AnalysisResult(
        name="outcomes_by_arm",
        question=QUESTION,
        answer=answer(runs, labels),
        plots=tuple(plots(runs, styles, pair)),
        tables=tuple(tables(runs, labels, pair)),
        arms=labels,
    )


def answer(runs: nk.Runs, labels: dict[str, str]) -> str:
    """Return what each arm's test accuracy was at each budget, a line a budget.

    Of many arms, those with the best and the worst mean.
    """
    lines = ["Test accuracy, mean ± standard deviation over seeds:"]
    for snapshot in report.budget_snapshots(runs):
        errors = {
            arm: rows["test_error"] for arm, rows in report.rows_by_arm(runs, snapshot)
        }
        shown, rest = list(errors), ""
        if len(errors) > LISTED:
            ordered = sorted(errors, key=lambda arm: float(errors[arm].mean()))
            shown = [ordered[0], ordered[-1]]
            rest = f", the best and the worst of {len(errors)} arms"
        accuracies = "; ".join(
            f"{report.accuracy_words(errors[arm])} ({labels[arm]})" for arm in shown
        )
        lines.append(f"At {figures.snapshot_words(snapshot)} {accuracies}{rest}.")
    return "\n".join(lines)


# %%
# Figures
# -------
# The line goes from the smallest batch (alpha 0) to the largest (alpha 1). How wide a
# valley looks depends on the scale of the weights: their norm is in the table.


def plots(
    runs: nk.Runs, styles: dict[str, figures.ArmStyle], pair: tuple[str, str] | None
) -> Iterator[figures.Plot]:
    """Yield the curves and the line between two solutions."""
    yield figures.training_curves(runs.evaluations, styles=styles)
    if pair is not None and report.same_network(runs, pair):
        start, end = (styles[arm].label for arm in pair)
        yield figures.linear_path(
            line_between(runs, pair), start_label=start, end_label=end
        )


def line_between(runs: nk.Runs, pair: tuple[str, str]) -> pd.DataFrame:
    """Return losses and errors on training and test data along the line, per seed."""
    snapshot = report.end_snapshot(runs, pair)
    ends = runs.snapshots.query("snapshot == @snapshot").pivot(
        index="seed", columns="arm", values="run_id"
    )
    rows = []
    for seed, (start, end) in ends[list(pair)].dropna().iterrows():
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


# %%
# Tables
# ------
# Accuracy and epsilon-sharpness as in the paper's tables 2 to 4, the paper's own
# numbers beside ours. The paper trained on MNIST; its numbers show the size of the
# effect that it reported.

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


def tables(
    runs: nk.Runs, labels: dict[str, str], pair: tuple[str, str] | None
) -> Iterator[report.Table]:
    """Yield the tables, those of the paper first."""
    yield report.Table(
        "accuracy",
        report.accuracy_table(runs),
        "Accuracy per arm, mean ± standard deviation over seeds (Keskar's table 2).",
    )
    if len(rows := report.epsilon_table(runs)):
        yield report.Table(
            "epsilon_sharpness",
            rows,
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
        report.weights_table(runs),
        "Weight norm and distance from the start, mean ± standard deviation. Keskar "
        "et al. report that the small batch ends 3 to 10 times further away.",
    )
    if pair and len(rows := report.curve_gap_table(runs, pair[1], pair[0])):
        yield report.Table(
            "curve_gaps",
            rows,
            f"Largest gap between the curves of {labels[pair[1]]} and "
            f"{labels[pair[0]]} along the epochs, paired by seed, beside what "
            "exchanging the arms within pairs gives.",
        )
