"""From the tables of many runs to paired samples and the rules of a fair test."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from noisekit.core.vocabulary import QUANTITIES
from noisekit.records import Runs
from noisekit.report.results import Rule
from noisekit.stats import Contrast, PairedSample

_ENOUGH_PAIRS = 10
_BLIND_KINDS = frozenset({"start", "loss", "epochs", "updates", "stalled", "final"})
"""Kinds of snapshot that depend on the training data and the budget alone."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """The recipe's own terms of a fair test."""

    matched_loss: float = 1.25
    min_pairs: int = 2
    rate_selection: str = ""


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


def stated_contrasts(runs: Runs) -> tuple[Contrast, ...]:
    """Return the contrasts that the recipe of the runs fixed before they began."""
    stated = runs.recipe.get("contrasts", ())
    return TypeAdapter(tuple[Contrast, ...]).validate_python(stated)


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
    the pairs.
    """
    arms = (contrast.treatment, contrast.reference)
    treatment, reference = (
        values_by_seed(runs, contrast.quantity, arm=arm, snapshot=contrast.snapshot)
        for arm in arms
    )
    reason = None
    if fades_with_loss(contrast.quantity):
        reason = _unmatched(loss_ratio(runs, contrast), _rules(runs).matched_loss)
    planned = _planned_seeds(runs)
    reason = reason or _too_few(len(planned), _rules(runs).min_pairs)
    return PairedSample.by_seed(
        treatment, reference, seeds=planned, not_comparable=reason
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


def fair_test_rules(runs: Runs, contrasts: Iterable[Contrast]) -> tuple[Rule, ...]:
    """Return the rules of a fair test, each met or broken by these runs.

    Source:
        The critiques of Dinh et al. 2017, Hoffer et al. 2017, Shallue et al. 2019 and
        Andriushchenko et al. 2023 taken together.
    """
    contrasts = tuple(contrasts)
    return (
        _budget_rule(runs),
        _rate_rule(runs),
        *_loss_rules(runs, contrasts),
        _invariance_rule(runs),
        _seeds_rule(runs),
        _batch_norm_rule(runs),
        _selection_rule(runs),
        _completion_rule(runs),
    )


def _budget_rule(runs: Runs) -> Rule:
    last = runs.evaluations.groupby("arm", sort=False)[["epoch", "step"]].max()
    stated = "; ".join(
        f"{arm}: {row['epoch']:g} epochs, {row['step']:.0f} updates"
        for arm, row in last.iterrows()
    )
    kinds = set(runs.snapshots["kind"])
    both = {"epochs", "updates"} <= kinds
    return Rule("Budget in epochs and in updates", both, stated)


def _rate_rule(runs: Runs) -> Rule:
    table = runs.runs
    how = _rules(runs).rate_selection
    if not {"batch_size", "learning_rate"} <= set(table.columns):
        return Rule(
            "Learning rate varied or tuned per batch size",
            False,
            "One rate for all batch sizes: a difference may be one of rate per "
            f"example. {how}".strip(),
        )
    rates = table.groupby("batch_size")["learning_rate"].unique()
    shown = "; ".join(
        f"batch {size}: rates {', '.join(f'{rate:g}' for rate in sorted(found))}"
        for size, found in rates.items()
    )
    varied = all(len(found) > 1 for found in rates) or bool(how)
    return Rule(
        "Learning rate varied or tuned per batch size",
        varied,
        f"{shown}. {how}".strip(),
    )


def _loss_rules(runs: Runs, contrasts: tuple[Contrast, ...]) -> list[Rule]:
    allowed = _rules(runs).matched_loss
    rules = []
    for contrast in contrasts:
        if not fades_with_loss(contrast.quantity):
            continue
        ratio = loss_ratio(runs, contrast)
        fault = _unmatched(ratio, allowed)
        name = f"Training loss matched for {contrast.name}"
        detail = fault or f"ratio of training losses {ratio:.3g}, allowed {allowed:g}"
        rules.append(Rule(name, fault is None, detail))
    return rules


def _invariance_rule(runs: Runs) -> Rule:
    measured = {
        name
        for name in runs.measurements["quantity"].unique()
        if is_rescaling_invariant(name)
    }
    found = ", ".join(sorted(measured)) or "none was measured"
    return Rule(
        "A rescaling-invariant measure and the weight norm beside raw sharpness",
        bool(measured),
        f"{found}; the weight norm stands at every snapshot",
    )


def _seeds_rule(runs: Runs) -> Rule:
    by_arm = [set(rows) for _, rows in runs.runs.groupby("arm")["seed"]]
    count = len(set.intersection(*by_arm))
    return Rule(
        "Ten or more paired seeds",
        count >= _ENOUGH_PAIRS,
        f"{count} seeds; arms of one seed share the starting weights",
    )


def _batch_norm_rule(runs: Runs) -> Rule:
    model = _table(runs.recipe.get("model"))
    normalised = model.get("name") == "f1" or model.get("norm") == "batch"
    detail = (
        "the network normalises over the batch, so the arms differ in what they "
        "compute as well as in batch size"
        if normalised
        else "the network has no BatchNorm"
    )
    return Rule(
        "BatchNorm sees the same number of examples in all arms", not normalised, detail
    )


def _selection_rule(runs: Runs) -> Rule:
    kinds = sorted(set(runs.snapshots["kind"]))
    chosen = [kind for kind in kinds if kind not in _BLIND_KINDS]
    return Rule(
        "Snapshots are taken without a look at validation or test data",
        not chosen,
        f"taken by: {', '.join(kinds)}",
    )


def _completion_rule(runs: Runs) -> Rule:
    status = runs.runs["status"].value_counts()
    stated = ", ".join(f"{count} {name}" for name, count in status.items())
    return Rule("Every run is complete", set(status.index) == {"done"}, stated)


def _unmatched(ratio: float, allowed: float) -> str | None:
    if math.isnan(ratio):
        return "no pair of runs reached the snapshot in both arms"
    if 1 / allowed <= ratio <= allowed:
        return None
    return (
        f"training losses are not matched: their ratio is {ratio:.3g}, "
        f"{allowed:g} is allowed"
    )


def _too_few(count: int, needed: int) -> str | None:
    if count >= needed:
        return None
    return f"{count} paired seeds, {needed} are needed for a verdict"


def _planned_seeds(runs: Runs) -> tuple[int, ...]:
    return tuple(sorted({int(seed) for seed in runs.runs["seed"]}))


def _at(table: pd.DataFrame, arm: str, snapshot: str) -> "pd.Series[bool]":
    return (table["arm"] == arm) & (table["snapshot"] == snapshot)


def _by_seed(seeds: "pd.Series[int]", values: "pd.Series[float]") -> dict[int, float]:
    return {int(s): float(v) for s, v in zip(seeds, values, strict=True)}


def _rules(runs: Runs) -> _Rules:
    stated = runs.recipe.get("rules", {})
    return TypeAdapter(_Rules).validate_python(stated)


def _table(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
