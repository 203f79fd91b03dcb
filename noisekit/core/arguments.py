"""Checks of arguments and settings against their annotations.

A type or a bound is stated once, as an annotation. :func:`checked` enforces the
annotations of a public function, :func:`noisekit.core.settings.check_settings` those of
a dataclass. Knows no torch, so that packages without it use it too.
"""

import inspect
import math
import operator
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from itertools import chain
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import MappingProxyType, NoneType, SimpleNamespace, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt

from noisekit.core.errors import NoisekitError, UsageError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Hint:
    """Words of an error about a setting.

    Attributes:
        purpose: Follows the bound, such as ``"for an error estimate"``.
        advice: Follows the value, such as ``"SAM uses 0.05"``.
    """

    purpose: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True)
class CheckedElsewhere:
    """Marks an annotation whose values are checked where more is known of them."""


_LONGEST = 60
_BY_RISK = frozenset({"self", "cls", "model", "loss_fn", "batches"})
"""Not looked at here: where a risk is built, these are checked against each other."""
_SCALARS: Mapping[Any, tuple[Any, str]] = MappingProxyType(
    {
        bool: (bool, "True or False"),
        int: (Integral, "an integer"),
        float: (Real, "a number"),
        str: (str, "text"),
        NoneType: (NoneType, "None"),
        Path: (PathLike, "a path"),
    }
)
"""What is accepted in the place of each plain type, and its name in words."""
_CONTAINERS: Mapping[Any, tuple[Any, str]] = MappingProxyType(
    {
        abc.Callable: (abc.Callable, "a function"),
        abc.Iterable: (abc.Iterable, "an iterable"),
        abc.Mapping: (abc.Mapping, "a mapping"),
        abc.Sequence: (abc.Sequence, "a sequence"),
        list: (list, "a list"),
        tuple: ((tuple, list), "a tuple"),
    }
)
_PREFIXES = frozenset({"torch", "numpy", "pandas"})
"""Packages whose classes are named with them."""
_ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "Generator": "pass torch.Generator().manual_seed(0), or leave it out",
        "Optimizer": "pass the optimizer that updates the model",
        "Estimate": "pass what lambda_max or batch_sharpness returns",
    }
)
"""Ways out by the name of the class that is needed."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that checks its arguments against its annotations first.

    Types, bounds and choices are enforced, containers entry by entry; iterators are
    left unread. An annotation that is not understood accepts everything, and so do
    ``model``, ``loss_fn`` and ``batches``, which are checked together where the risk is
    built. Defaults are not checked. A call costs one or two microseconds per argument.

    Example:
        >>> @checked
        ... def product(H: object, *, num_matvecs: Annotated[int, Ge(1)] = 8) -> None:
        ...     "Spend products."
        >>> product(None, num_matvecs=0)
        Traceback (most recent call last):
        noisekit.core.errors.UsageError: num_matvecs needs to be at least 1, got 0; \
the default is 8.
    """
    names = tuple(inspect.signature(function).parameters)

    @wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        expected = expected_by(function)
        for name, value in chain(zip(names, args, strict=False), kwargs.items()):
            check = expected.get(name)
            if check is not None and check.unmet(value):
                raise UsageError(check.refusal(name, value))
        return function(*args, **kwargs)

    return with_checks


def call_given(name: str, function: Callable[..., R], *args: Any, takes: str) -> R:
    """Call a function that the user gave; an exception names the argument.

    Args:
        name: Of the argument.
        function: The user's.
        *args: What it is called with.
        takes: What that is, in words.

    Raises:
        UsageError: If the function raises.
    """
    try:
        return function(*args)
    except NoisekitError:
        raise
    except Exception as error:
        raise UsageError(
            f"{name} needs to be a function that takes {takes}, got "
            f"{shown(function)}, which raised {type(error).__name__}: {error}; call it "
            "with one of them to see where."
        ) from error


def shown(value: object) -> str:
    """Return a value in a few words: its type, and the value where it is short."""
    if isinstance(value, str | int | float | None):
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, list | tuple | dict):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        if all(isinstance(part, str | int | float | None) for part in parts):
            text = repr(value)
            return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        return f"a {type(value).__name__} of {len(value)} entries"
    kind = f"{_article(type(value).__name__)} {type(value).__name__}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"{kind} of shape {tuple(shape)} and {dtype}"
    return kind


_NO_HINT = Hint()
_TOO_MANY = 1000
"""An upper bound from here on is named only where a value exceeds it."""
_TOO_LARGE = 2**63
"""From here on PyTorch takes a float, but no longer an integer."""

Unmet = Callable[[object], str]
"""Returns what a value would need to be, in words; empty where it is accepted."""


@dataclass(frozen=True, slots=True)
class Check:
    """What one annotation accepts, and words for what it does not."""

    unmet: Unmet
    hint: Hint = _NO_HINT

    def refusal(self, name: str, value: object) -> str:
        """Return the message about a value that is not accepted."""
        needs = self.unmet(value)
        purpose = f" {self.hint.purpose}" if self.hint.purpose else ""
        advice = f"; {self.hint.advice}" if self.hint.advice else ""
        return f"{name} needs to be {needs}{purpose}, got {shown(value)}{advice}."


@cache
def expected_by(owner: Any) -> Mapping[str, Check]:
    """Return the checks of a function's parameters or of a dataclass' fields."""
    if isinstance(owner, type):
        hints = get_type_hints(owner, include_extras=True)
        found = {name: _check_of(hint) for name, hint in hints.items()}
    else:
        found = {
            name: _with_default(_check_of(_hint_of(owner, parameter)), parameter)
            for name, parameter in inspect.signature(owner).parameters.items()
            if parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
            and name not in _BY_RISK
        }
    return {name: check for name, check in found.items() if check.unmet is not _nothing}


def _hint_of(function: Any, parameter: inspect.Parameter) -> Any:
    """A parameter's annotation; ``Any`` where it names what is not imported."""
    annotated = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        found = get_type_hints(annotated, function.__globals__, include_extras=True)
    except NameError:  # imported for type checkers only
        return Any
    return found[parameter.name]


def _with_default(check: Check, parameter: inspect.Parameter) -> Check:
    """The check with the parameter's default as the way out, where there is none."""
    default = parameter.default
    if check.hint.advice or default is parameter.empty:
        return check
    if default is None:
        advice = "leave it out where it is not needed"
    elif isinstance(default, str | int | float):
        advice = f"the default is {default!r}"
    else:
        return check
    return replace(check, hint=replace(check.hint, advice=advice))


def _check_of(annotation: Any) -> Check:
    """The check of an annotation; one that is not understood accepts everything."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        members = [_check_of(member) for member in get_args(annotation)]
        hint = next((m.hint for m in members if m.hint != _NO_HINT), _NO_HINT)
        return Check(_any_of([member.unmet for member in members]), hint)
    if origin is Annotated:
        kind, *extras = get_args(annotation)
        if any(isinstance(extra, CheckedElsewhere) for extra in extras):
            return Check(_nothing)
        inner = _check_of(kind)
        hint = next((extra for extra in extras if isinstance(extra, Hint)), inner.hint)
        bounds = [extra for extra in extras if isinstance(extra, Gt | Ge | Lt | Le)]
        return Check(_bounded(inner.unmet, bounds), hint)
    if origin is Literal:
        return Check(_one_of(get_args(annotation)))
    kind = origin or annotation
    if kind in _CONTAINERS:
        return Check(_container(kind, get_args(annotation)))
    if kind in _SCALARS:
        return Check(_scalar(kind))
    return _instance(kind)


def _nothing(value: object) -> str:
    """Nothing is needed: everything is accepted."""
    del value
    return ""


def _any_of(members: Sequence[Unmet]) -> Unmet:
    if _nothing in members:
        return _nothing

    def unmet(value: object) -> str:
        needs = [member(value) for member in members]
        if "" in needs:
            return ""
        return " or ".join(dict.fromkeys(need for need in needs if need != "None"))

    return unmet


def _bounded(inner: Unmet, bounds: Sequence[Any]) -> Unmet:
    holds = [_holds_of(bound) for bound in bounds]

    def unmet(value: object) -> str:
        needs = inner(value)
        if needs:
            return needs
        for within in holds:
            if not within(value):
                return _in_words(bounds, value)
        return ""

    return unmet


def _one_of(choices: tuple[Any, ...]) -> Unmet:
    names = [repr(choice) for choice in choices]
    words = " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
    kinds = {type(choice) for choice in choices}
    return lambda value: "" if type(value) in kinds and value in choices else words


def _scalar(kind: Any) -> Unmet:
    accepted, words = _SCALARS[kind]
    number = kind in (int, float)

    def unmet(value: object) -> str:
        if type(value) is kind:
            return ""
        if kind is float and isinstance(value, int) and abs(value) >= _TOO_LARGE:
            return f"a number, as a float where it is {_TOO_LARGE:.0e} or more"
        fits = isinstance(value, accepted) and not (number and isinstance(value, bool))
        return "" if fits else words

    return unmet


def _container(kind: Any, entries: tuple[Any, ...]) -> Unmet:
    """The check of a function, a mapping, a tuple or another iterable."""
    accepted, words = _CONTAINERS[kind]
    if kind is abc.Callable:
        return lambda v: "" if callable(v) and not isinstance(v, type) else words
    parts = [_nothing if e is Ellipsis else _check_of(e).unmet for e in entries]
    if kind is abc.Mapping:
        of_key, of_item = parts or (_nothing, _nothing)
        return lambda v: _unmet_mapping(v, of_key, of_item)
    if kind is tuple and entries and entries[-1] is not Ellipsis:
        return lambda v: _unmet_tuple(v, parts)

    def unmet(value: object) -> str:
        # Text, models and tensors can be iterated over, but are hardly meant to be.
        whole = isinstance(value, str | bytes | abc.Mapping) or any(
            hasattr(value, name) for name in ("parameters", "dtype")
        )
        if whole or not isinstance(value, accepted):
            return words
        read = value if parts and isinstance(value, abc.Sequence | abc.Set) else ()
        needs = next((need for need in map(parts[0], read) if need), "")
        return f"{words} with each entry {needs}" if needs else ""

    return unmet


def _unmet_mapping(value: object, of_key: Unmet, of_item: Unmet) -> str:
    if not isinstance(value, Mapping):
        return "a mapping"
    for key, item in value.items():
        if of_key(key):
            return f"a mapping with each key {of_key(key)}"
        if of_item(item):
            return f"a mapping with each value {of_item(item)}"
    return ""


def _unmet_tuple(value: object, parts: Sequence[Unmet]) -> str:
    if not isinstance(value, tuple | list) or len(value) != len(parts):
        return f"a tuple of {len(parts)}"
    needs = [unmet(entry) for unmet, entry in zip(parts, value, strict=True)]
    wanted = next((need for need in needs if need), "")
    return f"a tuple of {len(parts)} with each entry {wanted}" if wanted else ""


def _instance(kind: Any) -> Check:
    """The check of a class; anything passes where it is not one."""
    static = getattr(kind, "_is_protocol", False) and not getattr(
        kind, "_is_runtime_protocol", False
    )
    if not isinstance(kind, type) or kind in (Any, object) or static:
        return Check(_nothing)
    root, _, rest = kind.__module__.partition(".")
    part = rest.partition(".")[0]
    path = [root, *([part] if part in {"nn", "optim"} else [])]
    words = ".".join([*(path if root in _PREFIXES else []), kind.__name__])
    words = f"{_article(words)} {words}"
    named = [base.__name__ for base in kind.__mro__]
    advice = next((_ADVICE[name] for name in named if name in _ADVICE), "")
    return Check(
        lambda value: "" if isinstance(value, kind) else words, Hint(advice=advice)
    )


def _holds_of(bound: Any) -> Callable[[Any], bool]:
    """Return whether a value keeps within a bound; of NaN none does."""
    for kind, name, holds in (
        (Gt, "gt", operator.gt),
        (Ge, "ge", operator.ge),
        (Lt, "lt", operator.lt),
        (Le, "le", operator.le),
    ):
        if isinstance(bound, kind):
            limit = getattr(bound, name)
            return lambda value: bool(holds(value, limit))
    return lambda value: True


def _in_words(bounds: Sequence[Any], value: Any) -> str:
    """The bounds in words, such as ``positive and finite``."""
    first, last = bounds[0], bounds[-1]
    if isinstance(first, Gt) and isinstance(last, Lt) and last.lt != math.inf:
        return f"between {first.gt} and {last.lt}"
    few = isinstance(last, Le) and operator.lt(last.le, _TOO_MANY)
    if few and isinstance(first, Ge):
        return f"from {first.ge} to {last.le}"
    words = [_bound_in_words(bound, value) for bound in bounds]
    return " and ".join(word for word in words if word)


def _bound_in_words(bound: Any, value: Any) -> str:
    match bound:
        case Gt(limit):
            return "positive" if limit == 0 else f"above {limit}"
        case Ge(limit):
            return f"at least {limit}" if value < limit or value != value else ""
        case Lt(limit):
            return "finite" if limit == math.inf else f"below {limit}"
        case Le(limit):
            return f"at most {limit:,}" if value > limit else ""
    return ""


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"
