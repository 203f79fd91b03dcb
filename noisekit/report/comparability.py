"""Pairs of runs by seed, and whether two arms may be compared."""

import math
from dataclasses import replace

import numpy as np

from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate
from noisekit.core.vocabulary import QUANTITIES
from noisekit.records import Runs
from noisekit.report.recipe_view import (
    fair_test_terms,
    gives_verdicts,
    one_split,
    planned_seeds,
    policy_bounds,
    stated_claims,
)
from noisekit.stats import (
    Claim,
    ClaimResult,
    Difference,
    SeedSample,
    Statistic,
    crossed_difference,
    judge,
    values_at,
)
from noisekit.stats.statistics.tables import group_runs, reduced_tail

_AT_BOUNDS = 0.9
"""Largest share of updates at a policy's bounds that is still a policy."""


def fades_with_loss(quantity: str) -> bool:
    """Return whether values of a quantity compare only at matched training loss.

    A quantity that the vocabulary does not know, such as a measure of the user's own,
    counts as one that fades: nothing is known that would excuse it from the check.
    """
    known = QUANTITIES.get(quantity)
    return known is None or known.fades_with_loss


def is_rescaling_invariant(quantity: str, variant: str = "") -> bool:
    """Return whether some function-preserving rescaling leaves a measure unchanged.

    Args:
        quantity: Its name.
        variant: The settings that its rows state; ``eta`` breaks the invariance.
    """
    known = QUANTITIES.get(quantity)
    return known is not None and known.invariance_in(variant) not in (None, "raw")


def budget_snapshots(runs: Runs) -> list[str]:
    """Return the snapshots at equal epochs and at equal updates, else the last one."""
    kinds = runs.snapshots.drop_duplicates("snapshot").set_index("snapshot")["kind"]
    named = [str(name) for name, kind in kinds.items() if kind in ("epochs", "updates")]
    return named or ["final"]


def judged_claims(runs: Runs) -> tuple[ClaimResult, ...]:
    """Return the claims of the recipe with their verdicts."""
    claims = stated_claims(runs)
    samples = {claim.name: sample_of(runs, claim) for claim in claims}
    return tuple(judge(claims, samples, verdicts=gives_verdicts(runs)))


def sample_of(runs: Runs, claim: Claim) -> SeedSample:
    """Return the numbers of a claim by seed, or why they may not be compared.

    Where the rules of a fair test refuse: a measure that fades with the training loss,
    between runs whose training losses do not match within the recipe's
    ``rules.matched_loss``; fewer seeds than ``rules.min_pairs``; a batch size that its
    policy held at a bound. A difference of error rates comes with its error over seeds
    and images, where each image's outcome was recorded. An identity or a control checks
    the instrument, so only missing seeds stand against it.
    """
    try:
        sample = claim.statistic.sample(runs, scale=claim.scale)
    except UsageError as error:
        return SeedSample((), (), not_comparable=str(error).rstrip("."))
    arms = _arms_of(runs, claim.statistic)
    planned = [set(seeds) for arm in arms if (seeds := planned_seeds(runs, arm))]
    if planned:  # a trunk with fewer seeds leaves no pairs that nobody planned
        sample = sample.at_seeds(set.intersection(*planned))
    terms = fair_test_terms(runs)
    reasons: list[str | None] = [sample.not_comparable]
    if claim.kind == "claim":
        reasons.append(loss_fault(runs, claim))
        reasons.append(_at_a_bound(runs, claim.statistic))
        if len(sample.seeds) < terms.min_pairs:
            noun = "paired seeds" if claim.compares else "seeds"
            needed = f"{terms.min_pairs} are needed for a verdict"
            reasons.append(f"{len(sample.seeds)} {noun}, {needed}")
    reason = next((text for text in reasons if text), None)
    crossed = _difference_over_images(runs, claim)
    return replace(sample, not_comparable=reason, crossed=crossed)


def spread_of(runs: Runs, claim: Claim) -> float | None:
    """Return the standard deviation over seeds of a claim's statistic.

    Of the paired differences where two groups are compared, and of logarithms where the
    claim is about a ratio. ``None`` where fewer than two seeds have a number, or where
    these do not differ.
    """
    ratio = claim.scale == "ratio"
    above, below = sample_of(runs, claim).complete(no_effect=1.0 if ratio else 0.0)
    if ratio:
        positive = (above > 0) & (below > 0)
        above, below = np.log(above[positive]), np.log(below[positive])
    if len(above) < 2:
        return None
    deviation = float(np.std(above - below, ddof=1))
    return deviation or None


def loss_fault(runs: Runs, claim: Claim) -> str | None:
    """Return why training losses do not match, where the claim needs that they do."""
    if not needs_matched_loss(claim):
        return None
    return mismatch(loss_ratio(runs, claim), fair_test_terms(runs).matched_loss)


def needs_matched_loss(claim: Claim) -> bool:
    """Return whether a claim compares runs by a quantity that fades with the loss."""
    compared = claim.compares or bool(claim.statistic.factors)
    fading = any(map(fades_with_loss, claim.statistic.quantities))
    return claim.kind == "claim" and compared and fading


def loss_ratio(runs: Runs, claim: Claim) -> float:
    """Return the ratio of training losses between the runs that a claim compares.

    Of two arms at a snapshot, the geometric mean over seeds of the treatment's loss
    over the reference's. Of more arms the ratio of the two that differ most. Of curves,
    the same over the last quarter of the runs. NaN where no seed has both.
    """
    statistic = claim.statistic
    at = statistic.snapshot
    if at is None:
        losses = reduced_tail(runs, "train_loss", tail=0.25)
    else:
        losses = values_at(runs, "train_loss", at=at)
    arms = _arms_of(runs, statistic)
    losses = losses[losses["value"] > 0]
    table = losses.pivot_table(index="seed", columns="arm", values="value")
    logs = np.log(table.reindex(columns=arms).to_numpy(dtype=float))  # (seeds, arms)
    if len(arms) == 2:
        gaps = logs[:, 0] - logs[:, 1]
        gaps = gaps[np.isfinite(gaps)]
        return math.exp(float(gaps.mean())) if gaps.size else math.nan
    complete = logs[np.isfinite(logs).all(axis=1)]
    means = complete.mean(axis=0) if len(complete) else complete
    return math.exp(float(np.ptp(means))) if means.size else math.nan


def _arms_of(runs: Runs, statistic: Statistic) -> list[str]:
    """Return the arms that a statistic reads, the treatment's first."""
    found = [group_runs(runs, group)["arm"] for group in statistic.groups]
    return list(dict.fromkeys(str(arm) for arms in found for arm in arms))


def _at_a_bound(runs: Runs, statistic: Statistic) -> str | None:
    """Return that a policy held the batch size at a bound, where one did.

    Then the comparison is one of constant batch sizes, whatever the policy.
    """
    arms = _arms_of(runs, statistic)
    for arm, bounds in policy_bounds(runs).items():
        sizes = runs.steps.loc[runs.steps["arm"] == arm, "batch_size"].dropna()
        if arm not in arms or not len(sizes):
            continue
        share = float(sizes.isin(bounds).mean())
        if share > _AT_BOUNDS:
            low, high = bounds
            return (
                f"the policy of {arm} held the batch size at a bound ({low:g} or "
                f"{high:g}) in {100 * share:.0f} % of the updates, {100 * _AT_BOUNDS:g}"
                " % is allowed"
            )
    return None


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


def correct_answers(runs: Runs, claim: Claim) -> tuple[np.ndarray, np.ndarray] | None:
    """Return whether each image was classified rightly, for both arms of a claim.

    Two tables of one row per seed and one column per image (seeds, images), of the
    seeds and images that both arms have. ``None`` unless the claim is a difference of
    error rates between two arms, all seeds share the images, and two seeds and images
    are there.
    """
    statistic = claim.statistic
    split, _, kind = claim.quantity.rpartition("_")
    table = runs.examples
    plain = isinstance(statistic, Difference)
    if not plain or kind != "error" or not len(table) or not one_split(runs):
        return None
    at = statistic.snapshot
    here = table[(table["snapshot"] == at) & (table["split"] == split)]
    wide = [
        here[here["arm"] == arm].pivot(
            index="seed", columns="example", values="correct"
        )
        for arm in _arms_of(runs, statistic)
    ]
    if len(wide) != 2:
        return None
    first, second = (part.dropna(axis="index") for part in wide)
    first, second = first.align(second, join="inner")
    if min(first.shape) < 2:
        return None
    return first.to_numpy(dtype=bool), second.to_numpy(dtype=bool)


def _difference_over_images(runs: Runs, claim: Claim) -> Estimate | None:
    answers = correct_answers(runs, claim)
    return None if answers is None else crossed_difference(*answers)
