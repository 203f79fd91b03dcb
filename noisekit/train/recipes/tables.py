"""Plain recipe tables: read, merged, overridden, spread over a grid."""

import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue

from noisekit.core.errors import RecipeError
from noisekit.train.recipes.recipe_errors import Fault, shown

Table = dict[str, JsonValue]


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
    plain: Table = json.loads(json.dumps(document, default=str))
    return plain


def merged(
    base: Table, over: Mapping[str, JsonValue], *, replace_kinds: bool = False
) -> Table:
    """Return ``base`` with ``over`` laid on it: tables merge, all else is replaced.

    Args:
        base: What lies below.
        over: What is laid on it.
        replace_kinds: Whether a table with another ``name`` than the one below
            replaces it, since another network or optimiser has other keys.
    """
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
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
    """Return ``base`` with each dotted key set."""
    for key, value in settings.items():
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


def parse_override(text: str) -> JsonValue:
    """Return the value of ``--set key=text``: TOML, or plain text where it is not."""
    try:
        value: JsonValue = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value


def spread(grid: JsonValue) -> tuple[list[JsonValue], list[Fault]]:
    """Return the arms of a grid: every combination of its keys' values, in order."""
    if not isinstance(grid, dict):
        return [], [Fault("grid", f"needs a table, got {shown(grid)}")]
    axes: dict[str, list[JsonValue]] = {}
    faults = []
    for key, values in _flat(grid).items():
        if isinstance(values, list) and values:
            axes[key] = values
        else:
            text = f"needs a list of one value or more, got {shown(values)}"
            faults.append(Fault(f"grid.{key}", text))
    names = short_names(axes)
    arms: list[JsonValue] = []
    for combination in itertools.product(*axes.values()):
        setting = dict(zip(axes, combination, strict=True))
        name = ".".join(f"{names[key]}-{_word(setting[key])}" for key in axes)
        arms.append({"name": name, "set": dict(setting)})
    return arms if axes else [], faults


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return each dotted key's last part, or all of it where two would collide."""
    last = {key: key.rsplit(".", 1)[-1] for key in keys}
    ends = list(last.values())
    return {key: end if ends.count(end) == 1 else key for key, end in last.items()}


def differences(one: Table, other: Table) -> list[str]:
    """Return the dotted keys at which two tables differ."""
    flat, other_flat = _flat(one), _flat(other)
    keys = dict.fromkeys((*flat, *other_flat))
    return [key for key in keys if flat.get(key) != other_flat.get(key)]


def _flat(table: Table, prefix: str = "") -> Table:
    """Undo TOML's nesting: ``training.batch_size = [..]`` may be written unquoted."""
    flat: Table = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _word(value: JsonValue) -> str:
    if isinstance(value, list):
        return "x".join(_word(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
