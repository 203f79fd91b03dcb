"""Pairs of runs by seed, and whether two arms may be compared."""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from noisekit.core.results import Estimate
from noisekit.core.vocabulary import QUANTITIES
from noisekit.records import Runs
from noisekit.report.recipe_view import fair_test_terms
from noisekit.stats import Contrast, PairedSample, crossed_difference


def fades_with_loss(quantity: str) -> bool:
    """Return whether values of a quantity compare only at matched training loss.

    A quantity that the vocabulary does not know, such as a measure of the user's own,
    counts as one that fades: nothing is known that would excuse it from the check.
    """
    known = QUANTITIES.get(quantity)
    return known is None or known.fades_with_loss


def is_rescaling_invariant(quantity: str) -> bool:
    """Return whether some function-preserving rescaling leaves a quantity unchanged."""
    known = QUANTITIES.get(quantity)
    return known is not None and known.invariance not in (None, "raw")


def values_by_seed(
    runs: Runs, quantity: str, *, arm: str, snapshot: str, variant: str | None = None
) -> dict[int, float]:
    """Return one value per seed of an arm at a snapshot; absent where there is none.

    Args:
        runs: The runs.
        quantity: Name in the vocabulary; a column of the snapshots, else measured.
        arm: Which arm.
        snapshot: Where in training.
        variant: Which setting of the measure; the first recorded if left out.
    """
    snapshots = runs.snapshots
    if quantity in snapshots.columns:
        rows = snapshots[_at(snapshots, arm, snapshot)]
        return _by_seed(rows["seed"], rows[quantity])
    table = runs.measurements
    rows = table[_at(table, arm, snapshot) & (table["quantity"] == quantity)]
    if variant is not None:
        rows = rows[rows["variant"] == variant]
    rows = rows.drop_duplicates("seed")
    return _by_seed(rows["seed"], rows["value"])


def budget_snapshots(runs: Runs) -> list[str]:
    """Return the snapshots at equal epochs and at equal updates, else the last one."""
    kinds = runs.snapshots.drop_duplicates("snapshot").set_index("snapshot")["kind"]
    named = [str(name) for name, kind in kinds.items() if kind in ("epochs", "updates")]
    return named or ["final"]


def paired_sample(runs: Runs, contrast: Contrast) -> PairedSample:
    """Return both arms' values by seed, or why they may not be compared.

    A measure that fades with the training loss is comparable only where the arms'
    training losses match within the recipe's ``rules.matched_loss``, on average over
    the pairs. A difference of error rates comes with its error over seeds and images,
    where each image's outcome was recorded.
    """
    arms = (contrast.treatment, contrast.reference)
    treatment, reference = (
        values_by_seed(runs, contrast.quantity, arm=arm, snapshot=contrast.snapshot)
        for arm in arms
    )
    terms = fair_test_terms(runs)
    planned = tuple(sorted({int(seed) for seed in runs.runs["seed"]}))
    reason = None
    if fades_with_loss(contrast.quantity):
        reason = mismatch(loss_ratio(runs, contrast), terms.matched_loss)
    if reason is None and len(planned) < terms.min_pairs:
        needed = terms.min_pairs
        reason = f"{len(planned)} paired seeds, {needed} are needed for a verdict"
    return PairedSample.by_seed(
        treatment,
        reference,
        seeds=planned,
        not_comparable=reason,
        crossed=_difference_over_images(runs, contrast),
    )


def paired_samples(
    runs: Runs, contrasts: Iterable[Contrast]
) -> dict[str, PairedSample]:
    """Return the paired sample of each contrast, by the contrast's name."""
    return {contrast.name: paired_sample(runs, contrast) for contrast in contrasts}


def loss_ratio(runs: Runs, contrast: Contrast) -> float:
    """Return training loss of the treatment over the reference, geometric mean.

    NaN where no seed has both.
    """
    where = contrast.snapshot
    above = values_by_seed(runs, "train_loss", arm=contrast.treatment, snapshot=where)
    below = values_by_seed(runs, "train_loss", arm=contrast.reference, snapshot=where)
    logs = [
        math.log(above[seed] / below[seed])
        for seed in above.keys() & below.keys()
        if above[seed] > 0 and below[seed] > 0
    ]
    return math.exp(float(np.mean(logs))) if logs else math.nan


def mismatch(ratio: float, allowed: float) -> str | None:
    """Return why two training losses do not match, ``None`` where they do."""
    if math.isnan(ratio):
        return "no pair of runs reached the snapshot in both arms"
    if 1 / allowed <= ratio <= allowed:
        return None
    return (
        f"training losses are not matched: their ratio is {ratio:.3g}, "
        f"{allowed:g} is allowed"
    )


def correct_answers(
    runs: Runs, contrast: Contrast
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return whether each image was classified rightly, for both arms of a contrast.

    Two tables of one row per seed and one column per image (seeds, images), of the
    seeds and images that both arms have. ``None`` unless the contrast is one of error
    rates and two seeds and images are there.
    """
    split, _, kind = contrast.quantity.rpartition("_")
    table = runs.examples
    if kind != "error" or not len(table):
        return None
    here = table[(table["snapshot"] == contrast.snapshot) & (table["split"] == split)]
    wide = [
        here[here["arm"] == arm].pivot(
            index="seed", columns="example", values="correct"
        )
        for arm in (contrast.treatment, contrast.reference)
    ]
    first, second = (part.dropna(axis="index") for part in wide)
    first, second = first.align(second, join="inner")
    if min(first.shape) < 2:
        return None
    return first.to_numpy(dtype=bool), second.to_numpy(dtype=bool)


def _difference_over_images(runs: Runs, contrast: Contrast) -> Estimate | None:
    answers = correct_answers(runs, contrast)
    return None if answers is None else crossed_difference(*answers)


def _at(table: pd.DataFrame, arm: str, snapshot: str) -> "pd.Series[bool]":
    return (table["arm"] == arm) & (table["snapshot"] == snapshot)


def _by_seed(seeds: "pd.Series[int]", values: "pd.Series[float]") -> dict[int, float]:
    return {int(s): float(v) for s, v in zip(seeds, values, strict=True)}
