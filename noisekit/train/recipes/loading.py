"""Read a recipe file and check all of it before anything runs."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from noisekit.core.errors import RecipeError
from noisekit.train.recipes.catalogue import analyses, find_recipe
from noisekit.train.recipes.consistency import (
    arm_faults,
    contrast_faults,
    estimator_faults,
    run_faults,
)
from noisekit.train.recipes.measure_spec import MeasureSpec
from noisekit.train.recipes.probe_spec import ProbeSpec
from noisekit.train.recipes.recipe import RUN_SECTIONS, ArmSpec, ContrastSpec, Recipe
from noisekit.train.recipes.recipe_errors import (
    Fault,
    not_one_of,
    schema_faults,
    sentence,
    shown,
)
from noisekit.train.recipes.run_spec import (
    OptimizerSpec,
    RunSections,
    SnapshotSpec,
    TrainingSpec,
)
from noisekit.train.recipes.subjects import DataSpec, ModelSpec
from noisekit.train.recipes.tables import (
    Table,
    contains,
    merged,
    parse_override,
    read_toml,
    spread,
    with_settings,
)
from noisekit.train.section import Section

FORMAT = 1
"""Newest shape of a recipe file that this version reads."""

_M = TypeVar("_M", bound=BaseModel)


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
    """
    path = find_recipe(name_or_path)
    document = read_toml(path)
    profiles = document.pop("profiles", {})
    default = document.pop("default_profile", "")
    chosen = str(default) if profile is None else profile
    layer = _profile_layer(path, profiles, chosen)
    settings = {key: parse_override(text) for key, text in (overrides or {}).items()}

    table, faults = _assembled(document, layer, with_settings({}, settings))
    table["profile"] = chosen
    faults += _all_faults(table)
    faults += _idle_overrides(table, settings)
    if faults:
        where = {f"profile {chosen}": layer, "--set": with_settings({}, settings)}
        raise RecipeError(_report(path, faults, where))
    return Recipe.from_json(json.dumps(_with_common_settings(table)))


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
        table["arms"], grid_faults = spread(table.pop("grid"))
        faults += grid_faults
    return table, faults


def _all_faults(table: Table) -> list[Fault]:
    faults: list[Fault] = []
    _parse(Recipe, _with_common_settings(table), faults)
    arms = _items(table, "arms")
    parsed_arms = [_parse(ArmSpec, arm, []) for arm in arms]
    names = [arm.name for arm in parsed_arms if arm is not None]
    faults += arm_faults(names)
    known = {str(fault) for fault in faults}
    for arm in parsed_arms:
        if arm is not None:
            faults += _faults_of_arm(arm, table, known)
    faults += _faults_of_contrasts(table, names)
    faults += _faults_of_analyses(table)
    return faults


def _faults_of_arm(arm: ArmSpec, table: Table, known: set[str]) -> Iterator[Fault]:
    """Yield an arm's own faults: those that the recipe has without it are known."""
    for key in arm.set:
        if key.split(".")[0] not in RUN_SECTIONS:
            text = not_one_of("a section", key.split(".")[0], sorted(RUN_SECTIONS))
            yield Fault(f"arms.{arm.name}.set.{key}", text)
    sections = {key: table[key] for key in RUN_SECTIONS if key in table}
    settings = {k: v for k, v in arm.set.items() if k.split(".")[0] in RUN_SECTIONS}
    found: list[Fault] = []
    resolved = with_settings(sections, settings)
    _parse(RunSections, resolved, found)
    found += _faults_between_sections(resolved)
    for fault in found:
        own = any(_overlap(key, fault.key) for key in settings)
        same = str(fault) if own else fault.key
        if known.isdisjoint({same, str(fault)}):
            known.update({same, str(fault)})
            key = f"arms.{arm.name}.set.{fault.key}" if own else fault.key
            yield Fault(key, fault.text)


def _faults_between_sections(table: Table) -> list[Fault]:
    """Check the sections that need each other, whatever is wrong with the others."""
    kinds: dict[str, type[Section]] = {
        "data": DataSpec,
        "training": TrainingSpec,
        "snapshots": SnapshotSpec,
        "measure": MeasureSpec,
    }
    read: dict[str, type[Section]] = {
        "training": TrainingSpec,
        "model": ModelSpec,
        "optimizer": OptimizerSpec,
        "probe": ProbeSpec,
    }
    found: list[Fault] = []
    for needed, faults in ((kinds, run_faults), (read, estimator_faults)):
        parsed = {key: _parse_rest(k, table.get(key, {})) for key, k in needed.items()}
        if None not in parsed.values():
            found += faults(RunSections.model_construct(None, **parsed))
    return found


def _faults_of_contrasts(table: Table, arms: list[str]) -> Iterator[Fault]:
    snapshots = _parse_rest(SnapshotSpec, table.get("snapshots", {}))
    measure = _parse_rest(MeasureSpec, table.get("measure", {}))
    if snapshots is None or measure is None:
        return
    for item in _items(table, "contrasts"):
        contrast = _parse(ContrastSpec, item, [])
        if contrast is not None:
            names = contrast.model_dump(include=set(_CONTRAST_NAMES))
            for key, text in contrast_faults(names, arms, snapshots, measure):
                yield Fault(f"contrasts.{contrast.name}.{key}", text)


def _faults_of_analyses(table: Table) -> Iterator[Fault]:
    known = [entry.name for entry in analyses()]
    for name in _items(table, "analyses"):
        if isinstance(name, str) and name not in known:
            yield Fault("analyses", not_one_of("an analysis", name, known))


_CONTRAST_NAMES = ("treatment", "reference", "snapshot", "quantity")


def _idle_overrides(table: Table, settings: Table) -> Iterator[Fault]:
    """Yield overrides that would do nothing, since arms set the same key."""
    arms = [_parse(ArmSpec, item, []) for item in _items(table, "arms")]
    for given in settings:
        setters = [
            arm.name
            for arm in arms
            if arm is not None and any(_overlap(key, given) for key in arm.set)
        ]
        if setters:
            text = f"has no effect, since arms set it: {', '.join(setters)}"
            yield Fault(given, f"{text}; change the arms or the grid")


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted key is the other, or lies below it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _with_common_settings(table: Table) -> Table:
    """Give the recipe what all its arms set, so that it need not repeat it."""
    arms = [_parse(ArmSpec, item, []) for item in _items(table, "arms")]
    settings = [arm.set for arm in arms if arm is not None]
    common = {
        key: value
        for key, value in (settings[0] if settings else {}).items()
        if key.split(".")[0] in RUN_SECTIONS
        and all(key in other for other in settings)
        and not contains(table, key)
    }
    return with_settings(table, common)


def _items(table: Table, key: str) -> list[JsonValue]:
    value = table.get(key)
    return value if isinstance(value, list) else []


def _parse(model: type[_M], value: JsonValue, faults: list[Fault]) -> _M | None:
    """Return the section, or ``None`` with its faults added to ``faults``."""
    try:
        # By way of JSON: there a list may become a tuple while types stay strict.
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        faults += schema_faults(error, model)
        return None


def _parse_rest(model: type[_M], value: JsonValue) -> _M | None:
    """Parse without the keys that are faulty, where the section stands without them."""
    try:
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        faulty = {
            str(details["loc"][0]) for details in error.errors() if details["loc"]
        }
        sound = value if isinstance(value, dict) else {}
        return _parse(model, {k: v for k, v in sound.items() if k not in faulty}, [])


def _report(path: Path, faults: list[Fault], layers: Mapping[str, Table]) -> str:
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    lines = [f"recipe {path} has {count}:"]
    for fault in faults:
        plain = re.sub(r"\[\d+\].*", "", fault.key)
        origin = [name for name, layer in layers.items() if contains(layer, plain)]
        lines.append(f"  {fault}" + (f" (from {origin[-1]})" if origin else ""))
    return "\n".join(lines)
