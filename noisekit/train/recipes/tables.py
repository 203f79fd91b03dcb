"""Plain recipe tables: read, merged, overridden, expanded over a grid."""

import itertools
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue

from noisekit.core.errors import RecipeError
from noisekit.records import RUN_COLUMNS
from noisekit.train.recipes.recipe_errors import Fault, shown

Table = dict[str, JsonValue]

MAX_ARMS = 10_000
_LENGTHS = ("every", "length")
_POINTS = "at"
_MAX_DEPTH = 16


def read_toml(path: Path) -> Table:
    """Return the contents of a TOML file; dates come as text.

    Raises:
        RecipeError: If the file cannot be read or is not TOML.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"recipe {path} cannot be read: {reason}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {path} is not TOML: {error}. Text needs quotes, and each table "
            "and key may occur once."
        ) from error
    except RecursionError as error:
        raise RecipeError(
            f"recipe {path} nests tables or lists too deeply; use dotted keys."
        ) from error
    return plain_table(document)


def plain_table(document: Mapping[str, object]) -> Table:
    """Return what TOML gave as JSON has it: dates come as text.

    Raises:
        RecipeError: If it is nested too deeply.
    """
    if _depth(document) > _MAX_DEPTH:
        raise RecipeError(
            f"recipes nest at most {_MAX_DEPTH} tables and lists, got more; use "
            "dotted keys."
        )
    plain: Table = json.loads(json.dumps(document, default=str))
    return plain


def _depth(document: object) -> int:
    """Return how deeply tables and lists are nested, without recursion."""
    depth, level = 0, [document]
    while level:
        depth += 1
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def merged(
    base: Table, over: Mapping[str, JsonValue], *, replace_kinds: bool = False
) -> Table:
    """Return ``base`` with ``over`` laid on it: tables merge, all else is replaced.

    A length, such as ``every = { epochs = 1 }``, and a named point of ``at`` are one
    value each, although they are written as tables.

    Args:
        base: What lies below.
        over: What is laid on it.
        replace_kinds: Whether a table with another ``name`` than the one below
            replaces it, since another network or optimizer has other keys.
    """
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if key in _LENGTHS:
            result[key] = value
            continue
        if isinstance(below, dict) and isinstance(value, dict):
            if key == _POINTS:
                result[key] = {**below, **value}
                continue
            other = replace_kinds and value.get("name", below.get("name"))
            if not other or other == below.get("name"):
                value = merged(below, value, replace_kinds=replace_kinds)
        result[key] = value
    return result


def nested(key: str, value: JsonValue) -> Table:
    """Return ``{"a": {"b": value}}`` for the key ``a.b``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def with_settings(base: Table, settings: Mapping[str, JsonValue]) -> Table:
    """Return ``base`` with each dotted key set; ``training.stop`` is one value."""
    for key, value in settings.items():
        if key == "training.stop":
            base = merged(base, nested(key, None))
        base = merged(base, nested(key, value))
    return base


def stated(table: JsonValue, key: str) -> JsonValue:
    """Return the value at a dotted key; ``None`` where nothing is stated."""
    for part in key.split("."):
        if not isinstance(table, dict):
            return None
        table = table.get(part)
    return table


def contains(table: JsonValue, key: str) -> bool:
    """Whether ``table`` states the dotted ``key`` or something below it."""
    for part in key.split("."):
        if not isinstance(table, dict) or part not in table:
            return False
        table = table[part]
    return True


def overlap(one: str, other: str) -> bool:
    """Whether one dotted key is the other, or lies below it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def parse_override(text: str) -> JsonValue:
    """Return the value of ``--set key=text``: TOML, or plain text where it is not."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return plain_table(document)["value"] if list(document) == ["value"] else text


def with_grid(arm: Table, *, key: str) -> tuple[list[JsonValue], list[Fault]]:
    """Return the arms of an arm's grid: every combination of its values, in order.

    Each is named by the arm, and by factor and value of each axis, as in
    ``large/learning_rate=0.1``; its settings lie on those of the arm.

    Args:
        arm: An arm, as written; one without a name has its grid's names alone.
        key: Dotted key of the grid, for its faults.
    """
    rest = {name: value for name, value in arm.items() if name != "grid"}
    without: list[JsonValue] = [rest] if rest else []
    grid = arm["grid"]
    if not isinstance(grid, dict):
        return without, [Fault(key, f"needs a table, got {shown(grid)}")]
    axes: dict[str, list[JsonValue]] = {}
    faults = []
    for axis, values in flat(grid).items():
        if isinstance(values, list) and values:
            axes[axis] = values
        else:
            text = f"needs a list of one value or more, got {shown(values)}"
            faults.append(Fault(f"{key}.{axis}", text))
    count = math.prod(map(len, axes.values()))
    if count > MAX_ARMS:
        text = f"makes {count:,} arms, at most {MAX_ARMS:,} are possible"
        return without, [*faults, Fault(key, text)]
    if not axes:
        return without, faults
    below = rest.get("set")
    settings = below if isinstance(below, dict) else {}
    names = short_names(axes)
    first = [str(rest["name"])] if rest.get("name") else []
    arms: list[JsonValue] = []
    for combination in itertools.product(*axes.values()):
        setting = dict(zip(axes, combination, strict=True))
        parts = [f"{names[axis]}={_word(value)}" for axis, value in setting.items()]
        name = "/".join([*first, *parts])
        arms.append({**rest, "name": name, "set": {**settings, **setting}})
    return arms, faults


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return each dotted key's last part, or all of it where two would collide.

    Likewise where it would collide with a column of the table of runs.
    """
    last = {key: key.rsplit(".", 1)[-1] for key in keys}
    ends = [*last.values(), *RUN_COLUMNS]
    return {key: end if ends.count(end) == 1 else key for key, end in last.items()}


def differences(one: Table, other: Table) -> list[str]:
    """Return the dotted keys at which two tables differ."""
    first, second = flat(one), flat(other)
    keys = dict.fromkeys((*first, *second))
    return [key for key in keys if first.get(key) != second.get(key)]


def flat(table: Table, prefix: str = "") -> Table:
    """Undo TOML's nesting: ``training.batch_size = [..]`` may be written unquoted."""
    result: Table = {}
    for key, value in table.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _word(value: JsonValue) -> str:
    """Return a value as a part of a name."""
    if isinstance(value, list):
        return "x".join(_word(item) for item in value)
    if isinstance(value, dict):
        return "-".join(f"{key}-{_word(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:g}".replace("+", "")
    return str(value).lower() if isinstance(value, bool) else str(value)
