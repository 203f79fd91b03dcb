"""Tables of arms: what was measured where, with means over seeds."""

from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from noisekit.figures import paired_ratios
from noisekit.records import Runs
from noisekit.report.comparability import budget_snapshots, fades_with_loss
from noisekit.report.recipe_view import (
    arm_settings,
    numbers_by_arm,
    stated_claims,
)
from noisekit.stats import Claim
from noisekit.stats.statistics.tables import group_runs

_MATCHED = 2
"""Most training losses at which arms are shown side by side, the lowest ones."""


def rows_by_arm(runs: Runs, snapshot: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each arm's rows of a snapshot, in the order of the arms."""
    table = runs.snapshots[runs.snapshots["snapshot"] == snapshot]
    for arm in runs.runs["arm"].drop_duplicates():
        here = table[table["arm"] == arm]
        if len(here):
            yield str(arm), here


def mean_and_spread(values: "pd.Series[float]") -> str:
    """Return mean ± standard deviation over seeds, as text; of one seed its value."""
    if len(values) == 1:
        return f"{values.iloc[0]:.4g}"
    return f"{values.mean():.4g} ± {values.std(ddof=1):.2g}"


def accuracy_words(errors: "pd.Series[float]") -> str:
    """Return the accuracy of a row of error rates, in percent, as text."""
    return f"{mean_and_spread(100 * (1 - errors))} %"


def accuracy_table(runs: Runs) -> pd.DataFrame:
    """Return train and test accuracy in percent per arm, at each budget."""
    places = dict.fromkeys((*budget_snapshots(runs), "stalled", "final"))
    return pd.DataFrame(
        {
            "snapshot": snapshot,
            "arm": arm,
            "train accuracy [%]": mean_and_spread(100 * (1 - here["train_error"])),
            "test accuracy [%]": mean_and_spread(100 * (1 - here["test_error"])),
            "training loss": mean_and_spread(here["train_loss"]),
            "updates": mean_and_spread(here["step"]),
        }
        for snapshot in places
        for arm, here in rows_by_arm(runs, snapshot)
    )


def weights_table(runs: Runs) -> pd.DataFrame:
    """Return weight norm and distance from the start per arm, at each budget."""
    return pd.DataFrame(
        {
            "snapshot": snapshot,
            "arm": arm,
            "weight norm": mean_and_spread(here["weight_norm"]),
            "distance from start": mean_and_spread(here["distance_from_start"]),
        }
        for snapshot in dict.fromkeys((*budget_snapshots(runs), "final"))
        for arm, here in rows_by_arm(runs, snapshot)
    )


def epsilon_table(runs: Runs) -> pd.DataFrame:
    """Return epsilon-sharpness and its first-order share per snapshot, box and arm."""
    table = runs.measurements
    keys = ["run_id", "snapshot", "variant"]
    shares = table[table["quantity"] == "first_order_share"]
    joined = table[table["quantity"] == "epsilon_sharpness"].merge(
        shares[[*keys, "value"]], on=keys, how="left", suffixes=("", "_share")
    )
    return pd.DataFrame(
        {
            "snapshot": snapshot,
            "box": variant,
            "arm": arm,
            "φ [%]": mean_and_spread(rows["value"]),
            "first-order share": mean_and_spread(rows["value_share"]),
        }
        for (snapshot, variant, arm), rows in joined.groupby(
            ["snapshot", "variant", "arm"], sort=False
        )
    )


def measured_table(runs: Runs, quantities: Iterable[str]) -> pd.DataFrame:
    """Return mean, standard deviation and number of values per snapshot and arm."""
    table = runs.measurements
    table = table[table["quantity"].isin(list(quantities))]
    by_arm = table.groupby(["snapshot", "arm", "quantity"], sort=False)["value"]
    return by_arm.agg(["mean", "std", "count"]).reset_index()


def ratio_table(
    runs: Runs, claims: Iterable[Claim], quantities: Sequence[str]
) -> pd.DataFrame:
    """Return quantities as ratios of two arms, for each pair of arms in claims.

    One claim about sharpness represents a pair of arms, at matched training loss where
    there is one. Quantities that were not measured there are left out.
    """
    tables = [pd.DataFrame()]
    for claim, arms in _one_per_pair(runs, claims):
        at = claim.statistic.snapshot or "final"
        for source in (runs.measurements, runs.snapshots):
            there = _quantities_of(source, list(arms), at, quantities)
            if there:
                ratios = paired_ratios(
                    source,
                    quantities=there,
                    snapshot=at,
                    treatment=arms[0],
                    reference=arms[1],
                    comparison=claim.description or claim.name,
                )
                tables.append(ratios)
    return pd.concat(tables, ignore_index=True)


def matched_snapshots(runs: Runs, quantity: str) -> list[str]:
    """Return the lowest losses at which every arm was measured, and the budgets."""
    table = runs.measurements
    table = table[table["quantity"] == quantity]
    arms = runs.runs["arm"].nunique()
    everywhere = table.groupby("snapshot")["arm"].nunique() == arms
    names = set(everywhere[everywhere].index)
    losses = [name for name in names if name.startswith("loss_")]
    losses.sort(key=lambda name: float(name.removeprefix("loss_")))
    budgets = [name for name in budget_snapshots(runs) if name in names]
    return [*reversed(losses[:_MATCHED]), *budgets]


def extreme_arms(runs: Runs) -> tuple[str, str] | None:
    """Return the first arms with the smallest and the largest batch.

    Where the arms do not differ in batch size: the reference and the treatment of the
    first claim that compares two, else the first and the last arm; ``None`` where there
    is one arm.
    """
    sizes = numbers_by_arm(runs, "training.batch_size")
    if len(set(sizes.values())) > 1:
        return min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    for claim in stated_claims(runs):
        pair = arms_compared(runs, claim)
        if pair is not None:
            return pair[1], pair[0]
    arms = [str(arm) for arm in runs.runs["arm"].drop_duplicates()]
    return (arms[0], arms[-1]) if len(arms) > 1 else None


def same_network(runs: Runs, arms: Iterable[str]) -> bool:
    """Return whether arms train the same network, so that a line can join them."""
    networks = arm_settings(runs, "model")
    first, *rest = (networks[arm] for arm in arms)
    return all(network == first for network in rest)


def end_snapshot(runs: Runs, arms: Iterable[str]) -> str:
    """Return where all arms count as trained: stalled if all seeds are, else final."""
    names = list(arms)
    table = runs.snapshots
    table = table[table["arm"].isin(names) & (table["snapshot"] == "stalled")]
    complete = len(table) == len(names) * runs.runs["seed"].nunique()
    return "stalled" if complete else "final"


def stability_limits(runs: Runs) -> dict[str, float]:
    """Return 2/η, the curvature at which plain gradient descent turns unstable.

    Arms with momentum, another optimizer or no known rate are left out.
    """
    names = arm_settings(runs, "optimizer.name")
    momentum = arm_settings(runs, "optimizer.momentum")
    return {
        arm: 2 / rate
        for arm, rate in numbers_by_arm(runs, "optimizer.learning_rate").items()
        if names[arm] == "sgd" and not momentum[arm]
    }


def _one_per_pair(
    runs: Runs, claims: Iterable[Claim]
) -> list[tuple[Claim, tuple[str, str]]]:
    pairs: dict[tuple[str, str], Claim] = {}
    for claim in claims:
        arms = arms_compared(runs, claim)
        if arms is not None and fades_with_loss(claim.quantity):
            known = pairs.get(arms)
            if known is None or (_at_a_loss(claim) and not _at_a_loss(known)):
                pairs[arms] = claim
    return [(claim, arms) for arms, claim in pairs.items()]


def arms_compared(runs: Runs, claim: Claim) -> tuple[str, str] | None:
    """Return treatment and reference where each is one arm, at one snapshot."""
    statistic = claim.statistic
    if not claim.compares or statistic.snapshot is None or len(statistic.groups) != 2:
        return None
    arms = [set(group_runs(runs, group)["arm"]) for group in statistic.groups]
    if any(len(names) != 1 for names in arms):
        return None
    (first,), (second,) = arms
    return str(first), str(second)


def _at_a_loss(claim: Claim) -> bool:
    return (claim.statistic.snapshot or "").startswith("loss_")


def _quantities_of(
    table: pd.DataFrame, arms: list[str], snapshot: str, names: Sequence[str]
) -> list[str]:
    """Return those of the names that both arms have at a snapshot."""
    rows = table[table["arm"].isin(arms) & (table["snapshot"] == snapshot)]
    if "quantity" not in table.columns:
        reached = rows["arm"].nunique() == len(arms)
        return [name for name in names if reached and name in table.columns]
    counts = rows.dropna(subset="value").groupby("quantity")["arm"].nunique()
    return [name for name in names if counts.get(name, 0) == len(arms)]
