"""Do large batches find sharper minima, and what else explains it?
================================================================

Answers with the claims that the recipe stated before the runs. Beside them, without
a verdict, are measures that a rescaling of the weights leaves unchanged, and two checks
of the instrument: a rescaled twin of one minimum, and PyHessian's eigenvalue of the
same problem. Runs on any set of runs whose recipe states claims.

Run it with ``noisekit analyse sharpness_vs_batch_size DIR``.
"""

# %%
# What is read
# ------------
# One row per run, snapshot and quantity. Sharpness is compared only where training
# losses match, since the curvature of cross-entropy falls with the loss.

from collections.abc import Iterator, Sequence

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
    results = report.judged_claims(runs)
    claims = [result.claim for result in results]
    arms = figures.arm_styles(runs.runs)
    return report.claims_result(
        runs,
        results,
        name="sharpness_vs_batch_size",
        arms={arm: style.label for arm, style in arms.items()},
        plots=plots(runs, results, arms),
        # Test error over images as well, PyHessian's eigenvalue beside ours, and ranks.
        tables=report.check_tables(runs, claims),
        warnings=warnings(runs),
    )


# %%
# Figures
# -------
# The claims; sharpness against training loss (Keskar's figure 6), with the rate's
# own limit of stability; each seed of each arm; and what else differs between the arms.


def plots(
    runs: nk.Runs,
    results: Sequence[stats.ClaimResult],
    arms: dict[str, figures.ArmStyle],
) -> Iterator[figures.Plot]:
    """Yield the figures, the most telling first."""
    if results:
        labels = {arm: style.label for arm, style in arms.items()}
        yield figures.claim_forest(results, arms=labels)
    yield figures.sharpness_against_loss(
        runs.measurements,
        runs.snapshots,
        styles=arms,
        thresholds=report.stability_limits(runs),
    )
    claims = [result.claim for result in results]
    measures = dict.fromkeys(claim.quantity for claim in claims)
    for measure in filter(report.fades_with_loss, measures):
        if snapshots := report.matched_snapshots(runs, measure):
            yield figures.paired_arms(
                runs.measurements,
                measure,
                snapshots=snapshots,
                styles=arms,
                name=f"paired_{measure}",
            )
    yield figures.paired_arms(
        runs.snapshots,
        "test_error",
        snapshots=report.budget_snapshots(runs),
        scale="linear",
        styles=arms,
        name="paired_test_error",
    )
    ratios = report.ratio_table(runs, claims, DESCRIPTIVE)
    if len(ratios):
        yield figures.descriptive_ratios(ratios)


# %%
# A warning that belongs to every number above
# --------------------------------------------
# Scaling one layer of a ReLU network up and the next one down leaves every prediction
# as it is and changes the largest eigenvalue at will (Dinh et al. 2017).


def warnings(runs: nk.Runs) -> Iterator[str]:
    """Yield what a reader must know before using the numbers."""
    yield from runs.faults
    run_id = str(runs.runs["run_id"].iloc[0])
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
