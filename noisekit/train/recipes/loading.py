"""Read a recipe file and check all of it before anything runs."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from noisekit.core.arguments import checked
from noisekit.core.errors import RecipeError
from noisekit.train.recipes.catalogue import find_recipe
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.recipe_errors import Fault, not_one_of, sentence, shown
from noisekit.train.recipes.tables import (
    MAX_ARMS,
    Table,
    contains,
    merged,
    overlap,
    parse_override,
    read_toml,
    stated,
    with_grid,
    with_settings,
)


@checked
def load_recipe(
    name_or_path: str | Path,
    *,
    profile: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the recipe of a bundled experiment, or of a TOML file.

    A profile is a table of the file that is laid over the rest: its tables merge, its
    lists replace, and a section with another ``name``, such as another network,
    replaces the section. Overrides are laid over both, key by key.

    Args:
        name_or_path: Name of a bundled experiment, a recipe file, or a folder that
            has a ``recipe.toml``.
        profile: Name of the profile; the file's ``default_profile`` if left out.
        overrides: Dotted keys and values as written in TOML, such as
            ``{"seeds.count": "3"}``.

    Raises:
        RecipeError: If there is no such recipe or profile, or if it has faults; the
            message lists all of them, with file and key.

    Example:
        >>> recipe = nk.load_recipe("small_vs_large_batch", profile="smoke")
        >>> [arm.name for arm in recipe.arms]
        ['small_low', 'small_high', 'large_low', 'large_high']
    """
    path = find_recipe(name_or_path)
    document = read_toml(path)
    profiles = document.pop("profiles", {})
    default = document.pop("default_profile", "")
    chosen = str(default) if profile is None else profile
    layer = _profile_layer(path, profiles, chosen)
    settings = {key: parse_override(text) for key, text in (overrides or {}).items()}

    planned, _ = _assembled(document, layer, {})
    table, faults = _assembled(document, layer, with_settings({}, settings))
    _note_planned_seeds(table, stated(planned, "seeds.count"))
    table["profile"] = chosen
    if table.get("format") == 1:
        raise RecipeError(_written_in_format_1(path))
    recipe, found = Recipe.checked(table)
    faults += found
    faults += _idle_overrides(table, settings)
    if recipe is None or faults:
        where = {f"profile {chosen}": layer, "--set": with_settings({}, settings)}
        raise RecipeError(_report(path, faults, where))
    return recipe


def profile_names(path: Path) -> tuple[str, ...]:
    """Return the names of the profiles in a recipe file."""
    profiles = read_toml(path).get("profiles", {})
    return tuple(profiles) if isinstance(profiles, dict) else ()


def _profile_layer(path: Path, profiles: JsonValue, chosen: str) -> Table:
    if not isinstance(profiles, dict):
        raise RecipeError(
            f"recipe {path}: profiles needs one table per profile, such as "
            f"[profiles.smoke], got {shown(profiles)}."
        )
    if not chosen:
        return {}
    layer = profiles.get(chosen)
    if layer is None:
        raise RecipeError(
            sentence(f"recipe {path} {not_one_of('a profile', chosen, profiles)}")
        )
    if not isinstance(layer, dict):
        raise RecipeError(
            f"recipe {path}: profiles.{chosen} needs a table, got {shown(layer)}."
        )
    return layer


def _assembled(
    document: Table, profile: Table, overrides: Table
) -> tuple[Table, list[Fault]]:
    """Lay profile and overrides on the document, and make arms of a grid."""
    faults: list[Fault] = []
    table: Table = {}
    for layer in (document, profile, overrides):
        if "arms" in layer and "grid" in layer:
            faults.append(Fault("grid", "arms and a grid exclude each other"))
        elif "arms" in layer:
            table.pop("grid", None)
        elif "grid" in layer:
            table.pop("arms", None)
        table = merged(table, layer, replace_kinds=layer is profile)
    if "grid" in table:
        table["arms"], grid_faults = with_grid({"grid": table.pop("grid")}, key="grid")
        return table, faults + grid_faults
    arms = table.get("arms")
    if isinstance(arms, list):
        table["arms"], grid_faults = _with_grids(arms)
        faults += grid_faults
    return table, faults


def _with_grids(arms: list[JsonValue]) -> tuple[list[JsonValue], list[Fault]]:
    """Return the arms, those of each arm's grid in its place."""
    expanded: list[JsonValue] = []
    faults: list[Fault] = []
    for number, arm in enumerate(arms, start=1):
        if not isinstance(arm, dict) or "grid" not in arm:
            expanded.append(arm)
            continue
        of_grid, found = with_grid(arm, key=f"arms.{arm.get('name', number)}.grid")
        expanded += of_grid
        faults += found
    if len(expanded) > MAX_ARMS:
        text = f"come to {len(expanded):,}, at most {MAX_ARMS:,} are possible"
        return [], [*faults, Fault("arms", text)]
    return expanded, faults


def _note_planned_seeds(table: Table, planned: JsonValue) -> None:
    """Put on record how many seeds the file states, where others were asked for."""
    seeds = table.get("seeds")
    if isinstance(seeds, dict) and planned not in (None, seeds.get("count")):
        table["seeds"] = {**seeds, "planned": planned}


def _idle_overrides(table: Table, settings: Table) -> Iterator[Fault]:
    """Yield overrides that would do nothing, since arms set the same key."""
    listed = table.get("arms")
    arms = [_table(arm) for arm in listed] if isinstance(listed, list) else []
    for given in settings:
        setters = [
            str(arm.get("name"))
            for arm in arms
            if any(overlap(key, given) for key in _table(arm.get("set")))
        ]
        if setters:
            text = f"has no effect, since arms set it: {', '.join(setters)}"
            yield Fault(given, f"{text}; change the arms or the grid")


def _table(value: JsonValue) -> Table:
    return value if isinstance(value, dict) else {}


def _written_in_format_1(path: Path) -> str:
    return (
        f"recipe {path} is written in format 1, this version reads format 2. Set "
        "format = 2, and write: training.microbatch = the batch divided by "
        "training.accumulation; training.epoch_end = 'drop' for drop_last, 'ragged' "
        "for allow_ragged; evaluation.every = { updates = 8 } for every_updates = 8; "
        "snapshots.at = { NAME = { epochs = 2 } } for epochs = { NAME = 2 }, likewise "
        "updates and stalled; training.stop.loss for train_loss; schedule.milestones "
        "= [{ share = 0.5 }, { updates = 100 }]; schedule.warmup = { length = "
        "{ updates = n }, start = 0.1 } for warmup_updates. Runs recorded in format 1 "
        "can still be read."
    )


def _report(path: Path, faults: list[Fault], layers: Mapping[str, Table]) -> str:
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    lines = [f"recipe {path} has {count}:"]
    for fault in faults:
        plain = re.sub(r"\[\d+\].*", "", fault.key)
        origin = [name for name, layer in layers.items() if contains(layer, plain)]
        lines.append(f"  {fault}" + (f" (from {origin[-1]})" if origin else ""))
    return "\n".join(lines)
