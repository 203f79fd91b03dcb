"""How noisy are the gradients, and what does batch size do to their norm?
=======================================================================

Reads the probe's readings of any set of runs, also of a loop of your own. Nothing here
is a claim about generalisation: the squared gradient norm against batch size is an
identity that checks the instrument, and the noise scale over training describes the
runs.

Run it with ``noisekit analyse gradient_noise DIR``.
"""

# %%
# What is read
# ------------
# The probe read each example's squared gradient norm in the training step's own
# backward pass. Averages are taken over readings before anything is divided, and a
# noise scale that is not resolved is drawn as the bound that it is.

from collections.abc import Iterator

import pandas as pd
import torch

import noisekit as nk
from noisekit import figures, report

NAME = "gradient_noise"
QUESTION = "How noisy are the gradients, and what does batch size do to their norm?"
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
DRAWS = 64
SLACK = 5.0  # standard errors, over all arms and batch sizes together


def analyse(runs: nk.Runs) -> report.AnalysisResult:
    """Return figures and tables of the gradient noise in a set of runs."""
    if runs.snapshots.empty:
        return report.own_loop_result(runs, name=NAME, question=QUESTION)
    snapshot = early_snapshot(runs)
    draws, moments, num_examples = drawn_norms(runs, snapshot)
    return report.AnalysisResult(
        name=NAME,
        question=QUESTION,
        answer=answer(draws, moments, num_examples, snapshot),
        plots=tuple(plots(runs, draws, moments, num_examples)),
        tables=tuple(tables(runs)),
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

    Late in training a few examples carry most of the gradient, and a mean over a few
    drawn batches is far from normal.
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
        names = ("grad_sq_norm", "variance_trace", "simple_noise_scale")
        values = {name: getattr(noise, name).value for name in names}
        moments.append({"arm": arm, **values})
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
    far = report.norm_deviations(draws, moments, num_examples)
    scales = moments["simple_noise_scale"].dropna()
    unresolved = len(moments) - len(scales)
    spread = "is not resolved in any arm"
    if len(scales):
        spread = f"lies between {scales.min():.3g} and {scales.max():.3g} examples"
    rest = f" (not resolved in {unresolved} of {len(moments)} arms)"
    sizes = f"{draws['batch_size'].min()} to {draws['batch_size'].max()}"
    agrees = "checks" if (far < SLACK).all() else "does not check"
    return (
        f"At {figures.snapshot_words(snapshot)} of the first seed the simple noise "
        f"scale {spread}{rest if unresolved else ''}. Mean squared norms of drawn "
        f"batches of {sizes} examples lie within {far.max():.1f} standard errors of "
        f"|g|² + (1 - B/N) tr Σ/B in {len(far)} cases, which {agrees} the instrument."
    )


# %%
# Figures and table
# -----------------


def plots(
    runs: nk.Runs, draws: pd.DataFrame, moments: pd.DataFrame, num_examples: int
) -> Iterator[figures.Plot]:
    """Yield the figures."""
    styles = figures.arm_styles(runs.runs)
    if runs.steps["variance_trace"].notna().any():
        yield figures.noise_over_training(runs.steps, styles=styles)
    yield figures.grad_sq_norm_against_batch_size(
        draws, moments, num_examples=num_examples, styles=styles
    )
    kept = runs.examples.dropna(subset="example_grad_sq_norm")
    if len(kept):
        yield figures.example_norm_histograms(
            kept, snapshots=list(kept["snapshot"].unique()), styles=styles
        )


def tables(runs: nk.Runs) -> Iterator[report.Table]:
    """Yield the noise at frozen weights, where it was measured."""
    names = ("variance_trace", "debiased_grad_sq_norm", "simple_noise_scale")
    if len(rows := report.measured_table(runs, names)):
        yield report.Table(
            "noise_by_arm",
            rows,
            "Gradient noise at frozen weights over all training examples: mean and "
            "standard deviation over seeds, and how many had a value.",
        )
