"""What is wrong with a recipe, in words: where, what is needed, what was written."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue, Tag, ValidationError
from pydantic_core import ErrorDetails

_KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
}
_TYPE_ERRORS: Mapping[str, str] = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "finite_number": "a finite number",
}
_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_LIMITS: Mapping[str, str] = {
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "a list of {min_length} or more",
}
_UNION_ERRORS = ("union_tag_invalid", "union_tag_not_found")
_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a recipe.

    Attributes:
        key: Dotted key, such as ``training.batch_size``.
        text: What is needed and what was found.
    """

    key: str
    text: str

    def __str__(self) -> str:
        """Write as one line."""
        return f"{self.key}: {self.text}"


def schema_faults(
    error: ValidationError, kind: object, *, prefix: str = ""
) -> list[Fault]:
    """Return the faults that pydantic found, in this project's words.

    Args:
        error: As raised by pydantic.
        kind: The type that was parsed: a model, or an annotated union.
        prefix: Dotted key of what was parsed.
    """
    faults = []
    for details in error.errors(include_url=False):
        place = _place(kind, details["loc"])
        key = dotted((prefix, *place.key) if prefix else place.key)
        if details["type"] in _UNION_ERRORS and isinstance(details["input"], dict):
            key = f"{key}.name"
        faults.append(Fault(key, _explain(details, place.known)))
    return faults


def unknown_keys(table: Iterable[str], known: Iterable[str]) -> list[Fault]:
    """Return a fault for each key of ``table`` that is not known."""
    known = set(known)
    return [Fault(key, _unknown_key(key, known)) for key in table if key not in known]


def dotted(location: Sequence[str | int]) -> str:
    """Return a key as written in TOML's dotted form; a list's item counts from 1."""
    parts = (f"[{part + 1}]" if isinstance(part, int) else part for part in location)
    return ".".join(parts).replace(".[", "[")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean ...?`` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def sentence(text: str) -> str:
    """Return the text with a full stop, unless it ends in a question."""
    return text if text.endswith("?") else f"{text}."


def not_one_of(what: str, got: str, known: Iterable[str]) -> str:
    """Return the text of a fault about an unknown name."""
    known = list(known)
    listed = ", ".join(map(repr, known)) or "none"
    return f"needs {what}, one of {listed}, got {got!r}{suggestion(got, known)}"


def shown(value: JsonValue) -> str:
    """Return a value as written in the recipe, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _explain(details: ErrorDetails, known: set[str]) -> str:
    """Return what is needed, and what was found."""
    kind, value = details["type"], details["input"]
    context = details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(details["loc"][-1]), known)
    if kind in _UNION_ERRORS and not isinstance(value, dict):
        kind = "dict_type"
    if kind in {"missing", "union_tag_not_found"}:
        return "is missing and has no default"
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_invalid":
        return _none_of(str(context["expected_tags"]), str(context["tag"]))
    if kind == "literal_error":
        return _none_of(str(context["expected"]), value)
    needs = _needed(kind, context) or f"something else ({details['msg']})"
    return f"needs {needs}, got {shown(value)}{_kind_of(value)}"


def _needed(kind: str, context: Mapping[str, Any]) -> str | None:
    """Return what a value needs to be, by the kind of pydantic's error."""
    if kind in _TYPE_ERRORS:
        return _TYPE_ERRORS[kind]
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"a number {words} {context[bound]:g}"
    return _LIMITS[kind].format(**context) if kind in _LIMITS else None


def _none_of(expected: str, got: JsonValue) -> str:
    names = re.findall("'([^']*)'", expected)
    return f"needs {expected}, got {shown(got)}{suggestion(str(got), names)}"


def _unknown_key(name: str, known: set[str]) -> str:
    text = sentence(f"unknown key{suggestion(name, known)}")
    return f"{text} Allowed here: {', '.join(sorted(known))}"


def _kind_of(value: JsonValue) -> str:
    kind = _KINDS.get(type(value))
    return f" ({kind})" if isinstance(value, str | bool) and kind else ""


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in a recipe: its key as written, and the keys of the table around it."""

    key: tuple[str | int, ...]
    known: set[str]


def _place(kind: object, location: Sequence[str | int]) -> _Place:
    """Follow pydantic's location through the types; tags of unions are no keys."""
    key: list[str | int] = []
    known: set[str] = set()
    inside = [kind]
    for part in location:
        tagged = [member for member in _members(inside) if _tag_of(member) == part]
        if tagged:
            inside = tagged
            continue
        key.append(part)
        models = [
            member for member in map(_bare, _members(inside)) if _is_model(member)
        ]
        if models:
            known = {name for model in models for name in model.model_fields}
            fields = [model.model_fields.get(str(part)) for model in models]
            inside = [field.annotation for field in fields if field is not None]
        else:
            inside = [
                item
                for member in map(_bare, _members(inside))
                for item in get_args(member)
            ]
    return _Place(tuple(key), known)


def _members(kinds: Iterable[object]) -> Iterator[object]:
    """Yield the members of unions, with their tags where they have any."""
    for kind in kinds:
        bare = _bare(kind)
        if get_origin(bare) in (Union, UnionType):
            yield from _members(get_args(bare))
        else:
            yield kind


def _bare(kind: object) -> object:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _tag_of(kind: object) -> str | None:
    extras = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((extra.tag for extra in extras if isinstance(extra, Tag)), None)


def _is_model(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
