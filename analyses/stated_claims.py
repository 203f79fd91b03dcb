"""What do the runs say about the claims that the recipe states?
===============================================================

Answers the recipe's own question with the claims that it stated before the runs: each
one's statistic, interval and verdict, with the rules of a fair test. Runs on any set of
runs whose recipe states claims; measures that were taken along the runs are drawn too.

Run it with ``noisekit analyse stated_claims DIR``.
"""

# %%
# What is read
# ------------
# Whatever the statistics of the claims name.

from collections.abc import Iterator, Sequence

import noisekit as nk
from noisekit import figures, report, stats


def analyse(runs: nk.Runs) -> report.AnalysisResult:
    """Return the verdicts of a set of runs, and their figure."""
    results = report.judged_claims(runs)
    styles = figures.arm_styles(runs.runs)
    return report.claims_result(
        runs,
        results,
        name="stated_claims",
        arms={arm: style.label for arm, style in styles.items()},
        plots=plots(runs, results, styles),
    )


# %%
# Figures
# -------
# The claims with their intervals and margins; then each measure that was taken along
# the runs, against updates.


def plots(
    runs: nk.Runs,
    results: Sequence[stats.ClaimResult],
    styles: dict[str, figures.ArmStyle],
) -> Iterator[figures.Plot]:
    """Yield the figure of the claims, and one of each series."""
    if results:
        labels = {arm: style.label for arm, style in styles.items()}
        yield figures.claim_forest(results, arms=labels)
    taken = runs.measurements[runs.measurements["snapshot"].isna()]
    series = runs.recipe.get("series", ())
    asked = dict.fromkeys(name for part in series for name in part["measures"])
    names = [name for name in asked if name in set(taken["quantity"])]
    if names:
        curves = taken.drop_duplicates(["run_id", "step", "quantity"]).pivot(
            index=["run_id", "arm", "seed", "step"], columns="quantity", values="value"
        )
        yield figures.training_curves(
            curves.reset_index(),
            quantities=names,
            against=["step"],
            styles=styles,
            name="series",
        )
