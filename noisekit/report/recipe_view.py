"""What the report reads of a recorded recipe: the only place that knows its shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from noisekit.records import Manifest, Runs
from noisekit.stats import Claim, claim_of, contrast

_LABELS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "f1": "F1",
    "fashion-mnist": "Fashion-MNIST",
    "mlp": "MLP",
    "mnist": "MNIST",
    "sgd": "SGD",
    "small_cnn": "CNN",
}


@dataclass(frozen=True, slots=True)
class FairTestTerms:
    """The recipe's own terms of a fair test.

    Attributes:
        matched_loss: Largest ratio of training losses that counts as matched.
        min_pairs: Fewest pairs of seeds behind a verdict.
        rate_selection: How the learning rates were chosen; empty if not stated.
    """

    matched_loss: float = 1.25
    min_pairs: int = 2
    rate_selection: str = ""


def title(runs: Runs) -> str:
    """Return experiment and profile, or the first run's name where there is none."""
    parts = [str(runs.recipe[key]) for key in ("name", "profile") if _has(runs, key)]
    return " · ".join(parts) or runs.directories[0].manifest.run_id


def question(runs: Runs) -> str:
    """Return what the experiment asks; empty for runs that belong to no recipe."""
    return str(runs.recipe.get("question", ""))


def gives_verdicts(runs: Runs) -> bool:
    """Return whether the runs may carry verdicts."""
    stated = runs.recipe.get("verdicts", runs.recipe.get("claims"))
    return stated is True


def stated_claims(runs: Runs) -> tuple[Claim, ...]:
    """Return the claims that the recipe stated before the runs, contrasts first.

    Raises:
        UsageError: If one cannot be judged by this version.
    """
    short, whole = (runs.recipe.get(key) for key in ("contrasts", "claims"))
    return (
        *(contrast(**table) for table in _tables(short)),
        *(claim_of(table) for table in _tables(whole)),
    )


def planned_seeds(runs: Runs, arm: str) -> range:
    """Return the seeds that the recipe gives an arm; none where it does not tell."""
    common = runs.recipe.get("seeds")
    arms = _tables(runs.recipe.get("arms"))
    own = next((stated.get("seeds") for stated in arms if stated["name"] == arm), None)
    if not isinstance(common, Mapping):
        return range(0)
    seeds = {**common, **{k: v for k, v in (own or {}).items() if v is not None}}
    count = min(int(seeds.get("count", 0)), int(common.get("count", 0)))
    first = int(seeds.get("first", 0))
    return range(first, first + count)


def seed_words(runs: Runs) -> str:
    """Return how many seeds the recipe planned and how many were run, in words."""
    seeds = runs.recipe.get("seeds")
    count = runs.runs["seed"].nunique()
    there = f"{count} seed{'' if count == 1 else 's'} run"
    if not isinstance(seeds, Mapping) or not isinstance(seeds.get("count"), int):
        return there
    asked, planned = seeds["count"], seeds.get("planned") or seeds["count"]
    words = f"{planned} planned, {there}"
    return words if asked == planned else f"{words} ({asked} were asked for)"


def fair_test_terms(runs: Runs) -> FairTestTerms:
    """Return what the recipe counts as a fair test."""
    stated = runs.recipe.get("rules", {})
    return TypeAdapter(FairTestTerms).validate_python(stated)


def run_settings(runs: Runs, key: str) -> list[object]:
    """Return what each run has at a dotted key, ``None`` where nothing is stated."""
    return [_setting(runs, run.manifest, key) for run in runs.directories]


def arm_settings(runs: Runs, key: str) -> dict[str, object]:
    """Return what the first run of each arm has at a dotted key."""
    arms = [run.manifest.arm for run in runs.directories]
    result: dict[str, object] = {}
    for arm, value in zip(arms, run_settings(runs, key), strict=True):
        result.setdefault(arm, value)
    return result


def numbers_by_arm(runs: Runs, key: str) -> dict[str, float]:
    """Return the number that each arm has at a dotted key; arms without are absent."""
    return {
        arm: float(value)
        for arm, value in arm_settings(runs, key).items()
        if isinstance(value, int | float)
    }


def policy_bounds(runs: Runs) -> dict[str, tuple[float, float]]:
    """Return the least and largest batch size of each arm's policy that has both.

    A table of sizes has none: it is where it was told to be. Where a policy states no
    least size, that is the arm's ``training.batch_size``.
    """
    found = {}
    first = numbers_by_arm(runs, "training.batch_size")
    for arm, stated in arm_settings(runs, "batch_policy").items():
        if isinstance(stated, Mapping) and "min" in stated:
            low = first.get(arm) if stated["min"] is None else stated["min"]
            ends = (low, stated.get("max"))
            if all(isinstance(end, int | float) for end in ends):
                low, high = map(float, ends)  # type: ignore[arg-type]
                found[arm] = (low, high)
    return found


def one_split(runs: Runs) -> bool:
    """Return whether all seeds share one split of the data."""
    seeds = runs.recipe.get("seeds")
    return not (isinstance(seeds, Mapping) and seeds.get("split") == "own")


def normalising_batches(runs: Runs) -> dict[str, float | None]:
    """Return how many examples BatchNorm sees together per arm; 0 without BatchNorm.

    Each run has on record whether its network was built with BatchNorm. ``None`` where
    that is not known: in older runs with a network of the user's own.
    """
    batch_sizes = numbers_by_arm(runs, "training.batch_size")
    microbatches = numbers_by_arm(runs, "training.microbatch")
    parts = numbers_by_arm(runs, "training.accumulation")
    result: dict[str, float | None] = {}
    for arm, known in _normalises(runs).items():
        if known is None:
            result[arm] = None
        elif not known:
            result[arm] = 0.0
        elif arm in microbatches or arm in batch_sizes:
            whole = batch_sizes.get(arm, 0.0) / parts.get(arm, 1.0)
            result[arm] = microbatches.get(arm, whole)
        else:
            result[arm] = None
    return result


def _normalises(runs: Runs) -> dict[str, bool | None]:
    """Return whether each arm's network has BatchNorm, by its first run on record."""
    result: dict[str, bool | None] = {}
    names, norms = (arm_settings(runs, f"model.{key}") for key in ("name", "norm"))
    for arm in names:
        # Runs that recorded no network had noisekit's first three, or the user's own.
        by_name = names[arm] == "f1" or norms[arm] == "batch"
        result[arm] = True if by_name else False if norms[arm] == "none" else None
    for run in reversed(runs.directories):
        layers = run.manifest.network.get("batch_norms")
        if layers is not None:
            result[run.manifest.arm] = layers > 0
    return result


def setting_words(runs: Runs) -> str:
    """Return data, network, optimizer and seeds in a few words, empty if not known."""
    sections = [_section_words(runs, name) for name in ("data", "model", "optimizer")]
    data, model, optimizer = sections
    seeds = runs.runs["seed"].nunique()
    known = [part for part in (data, _sized(runs, model), optimizer) if part]
    if not known:
        return ""
    noun = "seed" if seeds == 1 else "seeds"
    split = "one split" if one_split(runs) else "a split per seed"
    return ", ".join([*known, split, f"{seeds} {noun}"])


def _section_words(runs: Runs, section: str) -> str:
    """Return what all arms have in common; where they differ, how many there are."""
    names = {str(name) for name in arm_settings(runs, f"{section}.name").values()}
    if names == {"None"}:
        return ""
    if len(names) > 1:
        plural = {"data": "data sets", "model": "networks", "optimizer": "optimizers"}
        return f"{len(names)} {plural[section]}"
    [name] = names
    return _LABELS.get(name, name)


def _sized(runs: Runs, model: str) -> str:
    """Put the number of parameters before the network, where all arms share it."""
    run = runs.directories[0]
    start = run.snapshots / "start.safetensors"
    networks = list(arm_settings(runs, "model").values())
    if not model or networks[1:] != networks[:-1] or not start.is_file():
        return model
    weights = runs.weights(run.manifest.run_id, "start")
    return f"{sum(w.size for w in weights.values()) / 1000:.0f}k-parameter {model}"


def _setting(runs: Runs, manifest: Manifest, key: str) -> object:
    """Return a run's own setting, its factor, or what the recipe states."""
    for stated in (manifest.recipe, runs.recipe):
        value: object = stated
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
        factor = key.rsplit(".", 1)[-1]
        if factor in manifest.factors:
            return manifest.factors[factor]
    return None


def _tables(stated: object) -> list[dict[str, Any]]:
    if not isinstance(stated, list | tuple):
        return []
    return [dict(table) for table in stated if isinstance(table, Mapping)]


def _has(runs: Runs, key: str) -> bool:
    return bool(runs.recipe.get(key))
