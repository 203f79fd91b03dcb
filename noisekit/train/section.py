"""What all sections of a recipe have in common: strictness, kinds of values, kinds.

A section with several kinds, such as the network, is a union of classes that are told
apart by ``name``: one of the names in its table, or ``module:function`` of the user's
own code.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from noisekit.core.references import PATTERN

# Larger numbers overflow in float32, or are no exact integers in JSON's readers.
_LARGEST_FLOAT = 3e38
_LARGEST_INT = 10**15

PositiveInt = Annotated[int, Field(ge=1, le=_LARGEST_INT)]
PositiveFloat = Annotated[float, Field(gt=0, le=_LARGEST_FLOAT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_LARGEST_INT)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=_LARGEST_FLOAT)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

_WORD = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=_WORD, max_length=80)]
"""Text that is safe as a file name and as a column name."""
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
ArmName = Annotated[
    str, Field(pattern=rf"^{_PART}(=-?{_PART})?(/{_PART}=-?{_PART})*$", max_length=160)
]
"""A name, with ``/factor=value`` behind it for each axis of a grid."""
RunId = Annotated[str, Field(pattern=_WORD, max_length=200)]
"""Name of an arm with its seed behind, safe as a file name."""


def run_id_of(arm: str, seed: int) -> str:
    """Return the name of a run's directory: the arm without ``/`` and ``=``."""
    return f"{arm.replace('/', '.').replace('=', '-')}-seed{seed}"


Split = Literal["train", "validation", "test"]

OWN = "module:function"
"""Tag of a section that names the user's own code."""


class Section(BaseModel):
    """One table of a recipe: unknown keys are faults, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )


class OwnSection(Section):
    """A section whose ``name`` is ``module:function``; other keys are its arguments.

    Attributes:
        name: The function, or class, that is called with the arguments.

    A class that inherits from this and from another section states ``extra="allow"``
    itself: pydantic takes the last base's configuration.
    """

    name: Annotated[str, Field(pattern=PATTERN)]

    @property
    def arguments(self) -> dict[str, JsonValue]:
        """Keys that only the user's code knows."""
        return dict(self.model_extra or {})


def kind_of(default: str | None = None) -> Callable[[object], str | None]:
    """Return the discriminator of a union of sections: the tag of a section's kind.

    Args:
        default: Kind of a table without ``name``.
    """

    def tag(value: object) -> str | None:
        if isinstance(value, dict):
            name = value.get("name", default)
        else:
            name = getattr(value, "name", default)
        if not isinstance(name, str):
            return None
        return OWN if ":" in name else name

    return tag
