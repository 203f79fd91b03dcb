"""Parse the parts of a recipe, each once, and collect what is wrong with them."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import BaseModel, JsonValue, TypeAdapter, ValidationError

from noisekit.train.recipes.recipe_errors import Fault, schema_faults
from noisekit.train.recipes.run_spec import RunSections
from noisekit.train.recipes.tables import Table, with_settings

RUN_SECTIONS = frozenset(RunSections.model_fields)


@dataclass(frozen=True, slots=True)
class Parsed:
    """One part of a recipe.

    Attributes:
        value: The section; ``None`` where nothing of it could be used.
        faults: What is wrong with it. With faults, ``value`` is what is left without
            the faulty keys, for the checks between sections.
    """

    value: Any  # an instance of the part's type
    faults: tuple[Fault, ...] = ()


class PartParser:
    """Parses the fields of a model one by one, so that all faults are found."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._fields = model.model_fields
        self._types = get_type_hints(model, include_extras=True)

    def parse(self, key: str, table: Mapping[str, JsonValue]) -> Parsed:
        """Return the field ``key`` of ``table``, or its default."""
        if key in table:
            return parse_part(self._types[key], table[key], prefix=key)
        if self._fields[key].is_required():
            return Parsed(None, (Fault(key, "is missing and has no default"),))
        return Parsed(self._fields[key].get_default(call_default_factory=True))


def parse_part(kind: Any, value: JsonValue, *, prefix: str) -> Parsed:
    """Return ``value`` as ``kind``, a class or an annotated type.

    Args:
        kind: The type of the part.
        value: As read from TOML or JSON.
        prefix: Dotted key of the part, for its faults.
    """
    return _parse_json(kind, json.dumps(value), prefix)


# Arms share most sections: equal text is parsed once. Sections never change.
@lru_cache(maxsize=1024)
def _parse_json(kind: Any, text: str, prefix: str) -> Parsed:
    adapter = _adapter(kind)
    try:
        # From JSON, a list may become a tuple while types stay strict.
        return Parsed(adapter.validate_json(text))
    except ValidationError as error:
        faults = schema_faults(error, kind, prefix=prefix)
    value = json.loads(text)
    if not isinstance(value, dict):
        return Parsed(None, tuple(faults))
    below = [fault.key.removeprefix(f"{prefix}.") for fault in faults]
    faulty = {re.split(r"[.\[]", key)[0] for key in below}
    sound = {key: item for key, item in value.items() if key not in faulty}
    try:
        return Parsed(adapter.validate_json(json.dumps(sound)), tuple(faults))
    except ValidationError:
        return Parsed(None, tuple(faults))


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@dataclass(frozen=True)
class ParsedSections:
    """The sections of one arm, as far as they could be parsed.

    Attributes:
        values: Section by key; ``None`` where it could not be parsed.
        faults: What is wrong with single sections.
    """

    values: dict[str, Any]
    faults: list[Fault] = field(default_factory=list)

    def having(self, keys: Iterable[str]) -> bool:
        """Whether all these sections could be parsed."""
        return all(self.values[key] is not None for key in keys)

    def assembled(self) -> RunSections:
        """Return the sections as one, without validating them again."""
        return RunSections.model_construct(**self.values)


_SECTIONS = PartParser(RunSections)


def parse_sections(table: Mapping[str, JsonValue]) -> ParsedSections:
    """Return the sections of a recipe or an arm, parsed one by one."""
    parts = {key: _SECTIONS.parse(key, table) for key in RunSections.model_fields}
    return ParsedSections(
        {key: part.value for key, part in parts.items()},
        [fault for part in parts.values() for fault in part.faults],
    )


def arm_table(base: Table, settings: Mapping[str, JsonValue]) -> Table:
    """Return the sections of an arm: ``base`` with its settings laid on.

    Where an arm chooses another kind of a section, such as another optimizer, keys at
    a default of the kind below that the new one does not have are left out; where it
    states the section as a table, all such keys that it does not state.
    """
    result = with_settings(base, settings)
    for key in sorted(RUN_SECTIONS & base.keys()):
        before, after = base[key], result[key]
        if not isinstance(before, dict) or not isinstance(after, dict):
            continue
        if before.get("name") == after.get("name"):
            continue
        below = _SECTIONS.parse(key, base).value
        unknown = {fault.key for fault in _SECTIONS.parse(key, result).faults}
        own = settings.get(key)
        result[key] = {
            name: value
            for name, value in after.items()
            if f"{key}.{name}" not in unknown
            or (name in own if isinstance(own, dict) else not _is_default(below, name))
        }
    return result


def _is_default(section: BaseModel | None, name: str) -> bool:
    known = type(section).model_fields.get(name) if section is not None else None
    if known is None or known.is_required():
        return False
    default: object = known.get_default(call_default_factory=True)
    return bool(getattr(section, name) == default)
