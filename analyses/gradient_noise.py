"""How noisy are the gradients, and what does batch size do to their norm?
=======================================================================

Reads the probe's readings of any set of runs. Nothing here is a claim about
generalisation: the squared gradient norm against batch size is an identity that checks
the instrument, and the noise scale over training describes the runs.

Run it with ``noisekit analyse gradient_noise DIR``.
"""

# %%
# What is read
# ------------
# The probe read each example's squared gradient norm in the training step's own
# backward pass. Averages are taken over readings before anything is divided, and a
# noise scale that is not resolved is drawn as the bound that it is.

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import torch

import noisekit as nk
from noisekit import figures, report

QUESTION = "How noisy are the gradients, and what does batch size do to their norm?"
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
DRAWS = 64
SLACK = 5.0
ROUNDING = 1e-4


def analyse(runs: nk.Runs) -> report.AnalysisResult:
    """Return figures and tables of the gradient noise in a set of runs."""
    if runs.snapshots.empty:
        return recorded_readings(runs)
    snapshot = early_snapshot(runs)
    draws, moments, num_examples = drawn_norms(runs, snapshot)
    return report.AnalysisResult(
        name="gradient_noise",
        question=QUESTION,
        answer=answer(draws, moments, num_examples, snapshot),
        plots=tuple(plots(runs, draws, moments, num_examples)),
        tables=tuple(tables(runs)),
    )


def recorded_readings(runs: nk.Runs) -> report.AnalysisResult:
    """Return what a probe recorded in somebody's own loop; there is no more to read."""
    return report.AnalysisResult(
        name="gradient_noise",
        question=QUESTION,
        answer=f"{len(runs.steps)} readings of gradient noise were recorded; a loop "
        "outside of an experiment claims nothing.",
        plots=tuple(noise_plots(runs, figures.arm_styles(runs.runs))),
    )


# %%
# The squared norm against the batch size
# ---------------------------------------
# Shen (2018) saw the squared norm of the summed gradient grow linearly with the batch.
# That must be so while noise dominates: ``B^2 |G|^2 + B tr(Sigma)`` has slope 1
# below the noise scale and slope 2 above it. Batches are drawn at frozen weights and
# compared with what all per-example gradients predict.


def early_snapshot(runs: nk.Runs) -> str:
    """Return the highest training loss that every run reached, else the start.

    Late in training a few examples carry most of the gradient, and the mean over a few
    drawn batches says little.
    """
    table = runs.snapshots[runs.snapshots["kind"] == "loss"]
    reached = table.groupby("snapshot")["run_id"].nunique() == len(runs)
    losses = [float(name.removeprefix("loss_")) for name in reached[reached].index]
    return f"loss_{max(losses):g}" if losses else "start"


def drawn_norms(runs: nk.Runs, snapshot: str) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Return norms of drawn batches and the moments that predict them, per arm."""
    draws, moments, num_examples = [], [], 0
    for arm, rows in runs.runs.groupby("arm", sort=False):
        net = nk.revisit(runs, str(rows["run_id"].iloc[0]), snapshot)
        batches = net.batches("train")
        noise = nk.gradient_noise(net.model, net.loss_fn, batches)
        moments.append(
            {
                "arm": arm,
                "grad_sq_norm": noise.grad_sq_norm.value,
                "variance_trace": noise.variance_trace.value,
                "simple_noise_scale": noise.simple_noise_scale.value,
            }
        )
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        num_examples = len(targets)
        generator = torch.Generator().manual_seed(0)
        for size in (size for size in BATCH_SIZES if size <= num_examples):
            for _ in range(DRAWS):
                chosen = torch.randperm(num_examples, generator=generator)[:size]
                loss = net.loss_fn(net.model(inputs[chosen]), targets[chosen])
                grads = torch.autograd.grad(loss, list(net.model.parameters()))
                sq_norm = sum(float(grad.square().sum()) for grad in grads)
                draws.append({"arm": arm, "batch_size": size, "grad_sq_norm": sq_norm})
    return pd.DataFrame(draws), pd.DataFrame(moments), num_examples


def answer(
    draws: pd.DataFrame, moments: pd.DataFrame, num_examples: int, snapshot: str
) -> str:
    """Return how far drawn batches are from the identity, and where noise dominates."""
    far = deviations(draws, moments, num_examples)
    scales = moments["simple_noise_scale"].dropna()
    unresolved = len(moments) - len(scales)
    spread = (
        f"lies between {scales.min():.3g} and {scales.max():.3g} examples"
        if len(scales)
        else "is not resolved in any arm"
    )
    rest = (
        f" (not resolved in {unresolved} of {len(moments)} arms)" if unresolved else ""
    )
    sizes = f"{draws['batch_size'].min()} to {draws['batch_size'].max()}"
    agrees = "checks" if (far < SLACK).all() else "does not check"
    return (
        f"At the snapshot {snapshot!r} of the first seed the simple noise scale "
        f"{spread}{rest}. Mean squared norms of drawn batches of {sizes} examples lie "
        f"within {far.max():.1f} standard errors of |g|² + (1 - B/N) tr Σ/B in "
        f"{len(far)} cases, which {agrees} the instrument."
    )


def deviations(
    draws: pd.DataFrame, moments: pd.DataFrame, num_examples: int
) -> np.ndarray:
    """Return how many standard errors each mean of drawn norms is off."""
    far = []
    for (arm, size), rows in draws.groupby(["arm", "batch_size"]):
        norms = rows["grad_sq_norm"]
        wanted = expected(moments, str(arm), int(size), num_examples)
        # Rounding of float32 sums is all that is left when a batch holds all examples.
        stderr = norms.std() / np.sqrt(len(norms)) + ROUNDING * wanted
        far.append(abs(norms.mean() - wanted) / stderr)
    return np.array(far)


def expected(
    moments: pd.DataFrame, arm: str, batch_size: int, num_examples: int
) -> float:
    """Return the squared norm that the moments predict, drawn without replacement."""
    row = moments.set_index("arm").loc[arm]
    left = 1 - batch_size / num_examples
    return float(row["grad_sq_norm"] + row["variance_trace"] * left / batch_size)


# %%
# Figures
# -------


def plots(
    runs: nk.Runs, draws: pd.DataFrame, moments: pd.DataFrame, num_examples: int
) -> Iterator[figures.Plot]:
    """Yield the figures."""
    styles = figures.arm_styles(runs.runs)
    yield from noise_plots(runs, styles)
    yield figures.grad_sq_norm_against_batch_size(
        draws, moments, num_examples=num_examples, styles=styles
    )
    kept = runs.examples.dropna(subset="example_grad_sq_norm")
    if len(kept):
        yield figures.example_norm_histograms(
            kept, snapshots=list(kept["snapshot"].unique()), styles=styles
        )


def noise_plots(
    runs: nk.Runs, styles: Mapping[str, figures.ArmStyle]
) -> Iterator[figures.Plot]:
    """Yield the noise over training, where a probe read it."""
    if runs.steps["variance_trace"].notna().any():
        yield figures.noise_over_training(runs.steps, styles=styles)


# %%
# Table
# -----


def tables(runs: nk.Runs) -> Iterator[report.Table]:
    """Yield the noise at frozen weights, where it was measured."""
    table = runs.measurements
    names = ("variance_trace", "debiased_grad_sq_norm", "simple_noise_scale")
    table = table[table["quantity"].isin(names)]
    if len(table):
        by_arm = table.groupby(["snapshot", "arm", "quantity"], sort=False)["value"]
        yield report.Table(
            "noise_by_arm",
            by_arm.agg(["mean", "std", "count"]).reset_index(),
            "Gradient noise at frozen weights over all training examples: mean and "
            "standard deviation over seeds, and how many had a value.",
        )
