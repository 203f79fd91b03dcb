"""Settings that check themselves: types and bounds are stated once, by annotation.

A frozen dataclass annotates its fields with the types below and calls
:func:`check_settings` in ``__post_init__``; pydantic reads the same annotations.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt

from noisekit.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Hint:
    """Words of an error about a setting.

    Attributes:
        purpose: Follows the bound, such as ``"for an error estimate"``.
        advice: Follows the value, such as ``"SAM uses 0.05"``.
    """

    purpose: str = ""
    advice: str = ""


_NONE = "None"

Positive = Annotated[float, Gt(0), Lt(math.inf)]
NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
Fraction = Annotated[float, Gt(0), Lt(1)]
Count = Annotated[int, Ge(0)]
PositiveInt = Annotated[int, Ge(1)]
NumSamples = Annotated[int, Ge(2), Hint("for an error estimate")]


class Settings(Protocol):
    """A dataclass whose fields are settings."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def check_settings(settings: Settings) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        UsageError: If one has the wrong type or lies out of bounds; the message names
            the setting, what it needs and what it got.
    """
    hints = _annotations(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        needs, hint = _unmet(hints[field.name], value)
        if needs:
            purpose = f" {hint.purpose}" if hint.purpose else ""
            advice = f"; {hint.advice}" if hint.advice else ""
            raise UsageError(
                f"{field.name} needs to be {needs}{purpose}, got {value!r}{advice}."
            )


@cache
def _annotations(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _unmet(annotation: Any, value: object) -> tuple[str, Hint]:
    """What the value would need to be, empty where it is that; and its hint."""
    union = get_origin(annotation) in (Union, UnionType)
    members = get_args(annotation) if union else (annotation,)
    unmet = [_unmet_by(member, value) for member in members]
    if any(not needs for needs, _ in unmet):
        return "", Hint()
    hint = next((hint for _, hint in unmet if hint != Hint()), Hint())
    return " or ".join(needs for needs, _ in unmet if needs != _NONE), hint


def _unmet_by(annotation: Any, value: object) -> tuple[str, Hint]:
    """The same for one member of a union."""
    kind, bounds, hint = annotation, [], Hint()
    if get_origin(annotation) is Annotated:
        kind, *extras = get_args(annotation)
        bounds = [extra for extra in extras if not isinstance(extra, Hint)]
        hint = next((extra for extra in extras if isinstance(extra, Hint)), hint)
    if not _is_a(kind, value):
        return _name_of(kind), hint
    if any(not _holds(bound, value) for bound in bounds):
        return _words(bounds), hint
    return "", hint


def _is_a(kind: Any, value: object) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind in (bool, type(None)):
        return isinstance(value, kind)
    numbers = {int: Integral, float: Real}
    plain = numbers.get(kind, get_origin(kind) or kind)
    if plain is Any or not isinstance(plain, type):
        return True  # what is not understood is not checked
    return isinstance(value, plain) and not (
        kind in numbers and isinstance(value, bool)
    )


def _holds(bound: Any, value: Any) -> bool:
    match bound:
        case Gt(limit):
            return bool(value > limit)
        case Ge(limit):
            return bool(value >= limit)
        case Lt(limit):
            return bool(value < limit)
        case Le(limit):
            return bool(value <= limit)
        case _:
            return True


def _name_of(kind: Any) -> str:
    if get_origin(kind) is Literal:
        names = [repr(name) for name in get_args(kind)]
        return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
    words = {
        bool: "True or False",
        int: "an integer",
        float: "a number",
        type(None): _NONE,
    }
    return words.get(kind, str(getattr(kind, "__name__", kind)))


def _words(bounds: list[Any]) -> str:
    """The bounds in words, such as ``positive and finite``."""
    match bounds:
        case [Gt(0), Lt(math.inf)]:
            return "positive and finite"
        case [Ge(0), Lt(math.inf)]:
            return "0 or more, and finite"
        case [Gt(low), Lt(high)]:
            return f"between {low} and {high}"
        case [Ge(low)]:
            return f"at least {low}"
    return " and ".join(map(str, bounds))
