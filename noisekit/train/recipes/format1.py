"""Recipes and runs that were recorded in format 1, in today's terms.

Changed in format 2: ``training.accumulation`` became ``training.microbatch``,
``drop_last`` and ``allow_ragged`` became ``training.epoch_end``, and every "when"
became a point. A recording in format 1 also has the keys of all kinds of a section,
where one in format 2 has those of its own kind.
"""

import math
from collections.abc import Callable, Mapping

from pydantic import JsonValue

from noisekit.train.recipes.measure_spec import translated_measure
from noisekit.train.recipes.tables import Table, flat, with_settings

_KEYS_OF_ONE_KIND: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "data": {
        "num_features": ("gaussian",),
        "num_classes": ("gaussian",),
        "noise": ("gaussian",),
        "path": ("mnist", "fashion-mnist", "cifar10"),
    },
    "model": {
        "hidden": ("mlp",),
        "width": ("small_cnn",),
        "norm": ("mlp", "small_cnn"),
    },
    "optimizer": {
        "momentum": ("sgd",),
        "nesterov": ("sgd",),
        "betas": ("adam", "adamw"),
        "eps": ("adam", "adamw"),
    },
}


def translated_recipe(table: Mapping[str, JsonValue]) -> Table:
    """Return a recorded recipe in today's terms.

    Before there was a list of claims, ``claims`` was whether there are verdicts.
    """
    if isinstance(table.get("claims"), bool):
        rest = {key: value for key, value in table.items() if key != "claims"}
        table = {**rest, "verdicts": table["claims"]}
    if table.get("format") != 1:
        return dict(table)
    base = translated_run(table)
    arms = table.get("arms")
    base["arms"] = [
        _translated_arm(arm, dict(table), base) if isinstance(arm, dict) else arm
        for arm in (arms if isinstance(arms, list) else [])
    ]
    return base


def translated_run(table: Mapping[str, JsonValue]) -> Table:
    """Return a recorded run in format 2; one in format 2 comes back as it is."""
    if table.get("format") != 1:
        return dict(table)
    result: Table = {**table, "format": 2}
    for section, translated in _TRANSLATIONS.items():
        stated = result.get(section)
        if isinstance(stated, dict):
            result[section] = translated(stated)
    return result


def _translated_arm(arm: Table, recorded: Table, base: Table) -> Table:
    """Return an arm that sets what differs, once both sides are translated."""
    stated = arm.get("set")
    if not isinstance(stated, dict):
        return arm
    before, after = flat(base), flat(translated_run(with_settings(recorded, stated)))
    settings = {
        key: value
        for key, value in after.items()
        if key in stated or before.get(key, _MISSING) != value
    }
    return {**arm, "set": settings}


_MISSING = object()


def _of_its_kind(section: str) -> Callable[[Table], Table]:
    """Return what removes the keys of other kinds, and those left out."""
    owners = _KEYS_OF_ONE_KIND[section]

    def translated(table: Table) -> Table:
        kind = table.get("name")
        return {
            key: value
            for key, value in table.items()
            if value is not None and (key not in owners or kind in owners[key])
        }

    return translated


def _schedule(table: Table) -> Table:
    result: Table = {"name": table.get("name", "constant")}
    warmup, milestones = table.get("warmup_updates"), table.get("milestones")
    if isinstance(warmup, int) and warmup > 1:
        # (update + 1) / warmup, as a line from the first update to the last.
        result["warmup"] = {"length": {"updates": warmup - 1}, "start": 1 / warmup}
    if isinstance(milestones, list) and milestones:
        result["milestones"] = [_milestone(place) for place in milestones]
        result["gamma"] = table.get("gamma", 0.1)
    return result


def _milestone(place: JsonValue) -> JsonValue:
    assert isinstance(place, int | float)
    return {"share": place} if place < 1 else {"updates": math.ceil(place)}


def _training(table: Table) -> Table:
    result: Table = {k: v for k, v in table.items() if k in {"batch_size", "loss"}}
    batch, parts = table.get("batch_size"), table.get("accumulation", 1)
    if isinstance(batch, int) and isinstance(parts, int) and parts > 1:
        result["microbatch"] = batch // parts
    ends = {"drop_last": "drop", "allow_ragged": "ragged"}
    chosen = [end for key, end in ends.items() if table.get(key)]
    result["epoch_end"] = chosen[0] if chosen else "divides"
    stop = table.get("stop")
    names = {"train_loss": "loss"}
    result["stop"] = {
        names.get(key, key): value
        for key, value in (stop.items() if isinstance(stop, dict) else ())
        if value is not None
    }
    return result


def _evaluation(table: Table) -> Table:
    result: Table = {k: v for k, v in table.items() if k == "batch_size"}
    for old, unit in (("every_updates", "updates"), ("every_epochs", "epochs")):
        if table.get(old) is not None:
            result["every"] = {unit: table[old]}
    return result


def _snapshots(table: Table) -> Table:
    result: Table = {k: v for k, v in table.items() if k in {"losses", "sustain"}}
    points: Table = {}
    for unit in ("epochs", "updates"):
        named = table.get(unit)
        for name, place in named.items() if isinstance(named, dict) else ():
            points[name] = {unit: place}
    if table.get("stalled") is not None:
        points["stalled"] = {"stalled": table["stalled"]}
    return {**result, "at": points}


_TRANSLATIONS: Mapping[str, Callable[[Table], Table]] = {
    "data": _of_its_kind("data"),
    "model": _of_its_kind("model"),
    "optimizer": _of_its_kind("optimizer"),
    "schedule": _schedule,
    "training": _training,
    "evaluation": _evaluation,
    "snapshots": _snapshots,
    "measure": translated_measure,
}
