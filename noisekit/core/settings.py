"""Settings that check themselves: types and bounds are stated once, by annotation.

A frozen dataclass annotates its fields with the types below and calls
:func:`check_settings` in ``__post_init__``; functions do so with
:func:`noisekit.core.arguments.checked`. Pydantic reads the same annotations in recipes.
Knows no torch.
"""

import math
from dataclasses import Field, fields
from typing import Annotated, Any, ClassVar, Protocol

from annotated_types import Ge, Gt, Le, Lt

from noisekit.core.arguments import CheckedElsewhere as CheckedElsewhere
from noisekit.core.arguments import Hint as Hint
from noisekit.core.arguments import expected_by
from noisekit.core.errors import UsageError

_MOST = 10**12
"""Most of anything that is counted: far above what runs, far below overflow."""

Positive = Annotated[float, Gt(0), Lt(math.inf)]
NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
Fraction = Annotated[float, Gt(0), Lt(1)]
Count = Annotated[int, Ge(0), Le(_MOST)]
PositiveInt = Annotated[int, Ge(1), Le(_MOST)]
NumPoints = Annotated[int, Ge(2), Le(10**6)]
NumSamples = Annotated[int, Ge(2), Le(_MOST), Hint("for an error estimate")]


class Settings(Protocol):
    """A dataclass whose fields are settings."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def check_settings(settings: Settings) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        UsageError: If one has the wrong type or lies out of bounds; the message names
            the setting, what it needs and what it got.
    """
    expected = expected_by(type(settings))
    for field in fields(settings):
        check, value = expected.get(field.name), getattr(settings, field.name)
        if check is not None and check.unmet(value):
            raise UsageError(check.refusal(field.name, value))
