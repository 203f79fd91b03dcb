"""Checks of optional arguments that many functions share, in the same words."""

from collections.abc import Iterable

import torch
from torch import nn

from noisekit.core.errors import UsageError

_LONGEST = 60


def as_patterns(params: object) -> tuple[str, ...]:
    """Return one name or several as a tuple.

    Raises:
        UsageError: If ``params`` is neither a text nor several.
    """
    texts = (params,) if isinstance(params, str) else params
    if isinstance(texts, Iterable) and not isinstance(texts, torch.Tensor | nn.Module):
        found = tuple(texts)
        if all(isinstance(text, str) for text in found):
            return found
    raise UsageError(
        f"params needs names or patterns such as 'layers.*.weight', got "
        f"{shown(params)}; list(dict(model.named_parameters())) has the names."
    )


def check_function(name: str, value: object) -> None:
    """Refuse an optional argument that is neither ``None`` nor a function.

    Raises:
        UsageError: If it cannot be called.
    """
    if value is not None and (not callable(value) or isinstance(value, type)):
        raise UsageError(
            f"{name} needs to be a function, got {shown(value)}; leave it out where "
            "it is not needed."
        )


def check_generator(generator: object) -> None:
    """Refuse an optional argument that is no random generator.

    Raises:
        UsageError: If it is neither ``None`` nor a ``torch.Generator``.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise UsageError(
            f"generator needs to be a torch.Generator, got {shown(generator)}; pass "
            "torch.Generator().manual_seed(0), or leave it out."
        )


def shown(value: object) -> str:
    """Return a value in a few words: its type, and the value where it is short."""
    kind = type(value).__name__
    if isinstance(value, str | int | float | bool | type(None)):
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"a {kind}"
