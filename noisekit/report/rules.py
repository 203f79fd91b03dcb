"""Rules of a fair test between arms, each met or broken by a set of runs."""

from collections.abc import Iterable, Mapping

from noisekit.core.vocabulary import QUANTITIES
from noisekit.figures import arm_styles
from noisekit.records import Runs
from noisekit.report.comparability import (
    is_rescaling_invariant,
    loss_ratio,
    mismatch,
    needs_matched_loss,
)
from noisekit.report.recipe_view import (
    fair_test_terms,
    normalising_batches,
    run_settings,
    seed_words,
)
from noisekit.report.results import Rule
from noisekit.stats import Claim, claim_titles

_ENOUGH_PAIRS = 10
_BLIND_KINDS = frozenset(
    {"start", "loss", "epochs", "updates", "share", "stalled", "final"}
)
"""Kinds of snapshot that depend on the training data and the budget alone."""


def fair_test_rules(runs: Runs, claims: Iterable[Claim]) -> tuple[Rule, ...]:
    """Return the rules of a fair test, each met or broken by these runs.

    Source:
        The critiques of Dinh et al. 2017, Hoffer et al. 2017, Shallue et al. 2019 and
        Andriushchenko et al. 2023 taken together.
    """
    claims = tuple(claims)
    arms = {arm: style.label for arm, style in arm_styles(runs.runs).items()}
    return (
        _budget_rule(runs, arms),
        _rate_rule(runs),
        *_loss_rules(runs, claims),
        _invariance_rule(runs),
        _seeds_rule(runs),
        *_planned_rules(runs),
        _batch_norm_rule(runs, arms),
        _selection_rule(runs),
        _completion_rule(runs),
    )


def _budget_rule(runs: Runs, arms: Mapping[str, str]) -> Rule:
    last = runs.evaluations.groupby("arm", sort=False)[["epoch", "step"]].max()
    stated = "; ".join(
        f"{arms[str(arm)]}: {row['epoch']:g} epochs, {row['step']:.0f} updates"
        for arm, row in last.iterrows()
    )
    kinds = set(runs.snapshots["kind"])
    both = {"epochs", "updates"} <= kinds
    return Rule("Budget in epochs and in updates", both, stated)


def _rate_rule(runs: Runs) -> Rule:
    name = "Learning rate varied or tuned per batch size"
    how = fair_test_terms(runs).rate_selection
    rates_of: dict[float, set[float]] = {}
    for size, rate in zip(
        run_settings(runs, "training.batch_size"),
        run_settings(runs, "optimizer.learning_rate"),
        strict=True,
    ):
        if isinstance(size, int | float):
            rates = rates_of.setdefault(float(size), set())
            rates |= {float(rate)} if isinstance(rate, int | float) else set()
    if len(rates_of) < 2:
        return Rule(name, True, f"The arms do not differ in batch size. {how}".strip())
    if len(set().union(*rates_of.values())) < 2:
        detail = (
            "One rate for all batch sizes: a difference may be one of rate per example."
        )
        return Rule(name, False, f"{detail} {how}".strip())
    shown = "; ".join(
        f"batch {size:g}: rates {', '.join(f'{rate:g}' for rate in sorted(rates))}"
        for size, rates in sorted(rates_of.items())
    )
    varied = all(len(rates) > 1 for rates in rates_of.values()) or bool(how)
    return Rule(name, varied, f"{shown}. {how}".strip())


def _loss_rules(runs: Runs, claims: tuple[Claim, ...]) -> list[Rule]:
    allowed = fair_test_terms(runs).matched_loss
    titles = claim_titles(claims)
    rules = []
    for claim in claims:
        if needs_matched_loss(claim):
            ratio = loss_ratio(runs, claim)
            fault = mismatch(ratio, allowed)
            detail = (
                fault or f"ratio of training losses {ratio:.3g}, allowed {allowed:g}"
            )
            name = f"Training loss matched for “{titles[claim.name]}”"
            rules.append(Rule(name, fault is None, detail))
    return rules


def _invariance_rule(runs: Runs) -> Rule:
    taken = runs.measurements[["quantity", "variant"]].drop_duplicates()
    measured = sorted(
        {
            QUANTITIES[name].label
            for name, variant in taken.fillna("").itertuples(index=False)
            if is_rescaling_invariant(name, variant)
        }
    )
    return Rule(
        "A rescaling-invariant measure and the weight norm beside raw sharpness",
        bool(measured),
        f"{', '.join(measured) or 'none was measured'}; the weight norm is recorded at "
        "every snapshot",
    )


def _seeds_rule(runs: Runs) -> Rule:
    by_arm = [set(rows) for _, rows in runs.runs.groupby("arm")["seed"]]
    count = len(set.intersection(*by_arm))
    return Rule(
        "Ten or more paired seeds",
        count >= _ENOUGH_PAIRS,
        f"{count} in all arms; {seed_words(runs)}; arms of one seed share the starting "
        "weights",
    )


def _planned_rules(runs: Runs) -> list[Rule]:
    """Return the rule about the number of seeds, where it is not the recipe's."""
    seeds = runs.recipe.get("seeds")
    if not isinstance(seeds, Mapping) or seeds.get("planned") is None:
        return []
    detail = seed_words(runs)
    if seeds["count"] > seeds["planned"]:
        detail += (
            "; seeds that are added once results are known make intervals too narrow"
        )
    return [Rule("As many seeds as were planned", False, detail)]


def _batch_norm_rule(runs: Runs, arms: Mapping[str, str]) -> Rule:
    name = "BatchNorm sees the same number of examples in all arms"
    batches = normalising_batches(runs)
    unknown = [arms[arm] for arm, size in batches.items() if size is None]
    if unknown:
        where = ", ".join(unknown)
        return Rule(name, False, f"not known whether it normalises: {where}")
    sizes = set(batches.values())
    if sizes == {0.0}:
        return Rule(name, True, "the network has no BatchNorm")
    if len(sizes) == 1:
        return Rule(name, True, f"it sees {sizes.pop():g} examples in all arms")
    shown = "; ".join(
        f"{arms[arm]}: {f'{size:g} examples' if size else 'no BatchNorm'}"
        for arm, size in batches.items()
    )
    return Rule(
        name,
        False,
        f"{shown}; so the arms differ in what they compute as well as in batch size",
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
