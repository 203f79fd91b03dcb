"""What is wrong with a recipe, in words: where, what is needed, what was written."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue, ValidationError
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


def schema_faults(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """Return the faults that pydantic found, in this project's words."""
    return [
        Fault(dotted(details["loc"]), _explain(details, model))
        for details in error.errors(include_url=False)
    ]


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


def _explain(details: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value = details["type"], details["input"]
    context = details.get("ctx", {})
    if kind == "extra_forbidden":
        *parents, name = details["loc"]
        known = _keys_at(model, parents)
        allowed = ", ".join(sorted(known))
        text = sentence(f"unknown key{suggestion(str(name), known)}")
        return f"{text} Allowed here: {allowed}"
    if kind == "missing":
        return "is missing and has no default"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        expected = str(context["expected"])
        choices = expected.replace(" or ", ", ").split(", ")
        close = suggestion(str(value), [choice.strip("'") for choice in choices])
        return f"needs {expected}, got {shown(value)}{close}"
    if kind == "string_pattern_mismatch":
        needs = f"text that matches {context['pattern']}"
    elif kind in _TYPE_ERRORS:
        needs = _TYPE_ERRORS[kind]
    elif kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        needs = f"a number {words} {context[bound]:g}"
    else:
        needs = f"something else ({details['msg']})"
    return f"needs {needs}, got {shown(value)}{_kind_of(value)}"


def _kind_of(value: JsonValue) -> str:
    kind = _KINDS.get(type(value))
    return f" ({kind})" if isinstance(value, str | bool) and kind else ""


def _keys_at(model: type[BaseModel], parents: Sequence[str | int]) -> set[str]:
    """Return the keys that the table at ``parents`` may have."""
    models = [model]
    for parent in parents:
        if isinstance(parent, str):
            models = [
                inner
                for outer in models
                if parent in outer.model_fields
                for inner in _models_in(outer.model_fields[parent].annotation)
            ]
    return {name for inner in models for name in inner.model_fields}


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple, list, dict):
        for part in get_args(annotation):
            yield from _models_in(part)
