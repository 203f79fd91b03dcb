"""What the readings of a training loop of one's own show; nothing is claimed."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from noisekit.core.vocabulary import quantity
from noisekit.figures import (
    Plot,
    arm_styles,
    noise_over_training,
    training_curves,
    windowed_noise,
)
from noisekit.records import Runs
from noisekit.report.results import AnalysisResult, Table

_NUM_WINDOWS = 4
_LOSS = "batch_loss"


def own_loop_result(runs: Runs, *, name: str, question: str) -> AnalysisResult:
    """Return noise scale, coverage, layers, loss and cost of recorded loops.

    Noise scales are ratios of averages over a window of updates, with Fieller's
    interval; the mean of single readings' ratios is not an estimate of anything.
    """
    steps = runs.steps
    readable = _with_noise(steps)
    whole = windowed_noise(readable, num_windows=1) if len(readable) else None
    return AnalysisResult(
        name=name,
        question=question,
        answer="\n".join(_statements(runs, whole)),
        plots=tuple(_plots(runs, readable)),
        tables=tuple(_tables(runs, readable)),
        arms={arm: style.label for arm, style in arm_styles(runs.runs).items()},
    )


def _with_noise(steps: pd.DataFrame) -> pd.DataFrame:
    """Return the readings that have both parts of a noise scale."""
    finite = [
        np.isfinite(steps[part].to_numpy(dtype=float))
        for part in ("variance_trace", "debiased_grad_sq_norm")
    ]
    readable: pd.DataFrame = steps.loc[np.logical_and(*finite)]
    return readable


def _statements(runs: Runs, whole: pd.DataFrame | None) -> Iterator[str]:
    labels = {arm: style.label for arm, style in arm_styles(runs.runs).items()}
    for arm, rows in runs.steps.groupby("arm", sort=False):
        noisy = len(_with_noise(rows))
        read = f"{len(rows)} readings up to update {rows['step'].max():.0f}"
        if not noisy:
            ways = ", ".join(sorted(set(rows["estimator"].dropna().astype(str))))
            yield (
                f"{labels[str(arm)]}: {read}, all without gradient noise (estimator: "
                f"{ways or 'none'}). Examples that are coupled, as by BatchNorm, have "
                "no gradients of their own; estimator='ghost' reads the noise of "
                "smaller batches."
            )
            continue
        missing = len(rows) - noisy
        rest = f", {missing} of them without gradient noise" if missing else ""
        yield f"{labels[str(arm)]}: {read}{rest}. {_scale_words(whole, str(arm))}"
    yield "A recorded loop claims nothing; there is no verdict."


def _scale_words(whole: pd.DataFrame | None, arm: str) -> str:
    assert whole is not None
    rows = whole[(whole["arm"] == arm) & (whole["quantity"] == "simple_noise_scale")]
    low, value, high = (float(rows[end].iloc[0]) for end in ("low", "value", "high"))
    label = quantity("simple_noise_scale").label.lower()
    head = f"Over the whole loop the {label}, a ratio of averages, is"
    if not math.isfinite(value) or not math.isfinite(high):
        return f"{head} not resolved: {low:.3g} examples or more."
    return f"{head} {value:.3g} examples (95 % interval {low:.3g} to {high:.3g})."


def _plots(runs: Runs, readable: pd.DataFrame) -> Iterator[Plot]:
    styles = arm_styles(runs.runs)
    if len(readable):
        yield noise_over_training(readable, styles=styles)
    if runs.steps[_LOSS].notna().any():
        yield training_curves(
            runs.steps.dropna(subset=_LOSS),
            quantities=[_LOSS],
            against=["step"],
            styles=styles,
            name="batch_loss",
        )


def _tables(runs: Runs, readable: pd.DataFrame) -> Iterator[Table]:
    if len(readable):
        yield Table(
            "noise_by_window",
            windowed_noise(readable, num_windows=_NUM_WINDOWS),
            "Gradient noise over windows of updates: averages with 95 % intervals, the "
            "noise scale as the ratio of the averages.",
        )
    yield Table(
        "coverage",
        _coverage(runs.steps),
        "How the readings were made, and the share of the parameters that they cover.",
    )
    if len(runs.layers):
        yield Table(
            "layers",
            _layers(runs.layers),
            "Gradient noise by layer, averaged over the readings; shares are of the "
            "sum over layers.",
        )


def _coverage(steps: pd.DataFrame) -> pd.DataFrame:
    by = ["arm", "estimator", "unit", "status"]
    groups = steps.fillna(dict.fromkeys(by, "none")).groupby(by, sort=False)
    return groups.agg(
        readings=("step", "size"),
        first=("step", "min"),
        last=("step", "max"),
        coverage=("coverage", "mean"),
    ).reset_index()


def _layers(layers: pd.DataFrame) -> pd.DataFrame:
    columns = ["grad_sq_norm", "variance_trace"]
    means = layers.groupby(["arm", "layer"], sort=False)[columns].mean()
    for column in columns:
        total = means[column].groupby("arm").transform("sum")
        means[f"share of {quantity(column).label.lower()}"] = means[column] / total
    return means.reset_index()
