"""References to a user's own code, ``module:function``, and the leave to import it.

A recipe may name data sets, networks, losses, optimizers and analyses that are the
user's own. Nothing that only reads a recipe, or the runs made from it, imports what it
names: :func:`resolve` refuses, unless the caller is inside :func:`allow_code`.
"""

import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from noisekit.core.errors import UsageError

PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
_REFERENCE = re.compile(PATTERN)
_ALLOWED: ContextVar[bool] = ContextVar("code_allowed", default=False)


def is_reference(name: str) -> bool:
    """Whether ``name`` has the form ``module:function``."""
    return _REFERENCE.match(name) is not None


def code_allowed() -> bool:
    """Whether code that a recipe names may be imported here."""
    return _ALLOWED.get()


@contextmanager
def allow_code(allowed: bool = True) -> Iterator[None]:
    """Allow importing what recipes name, inside the block and in this thread.

    Args:
        allowed: ``False`` changes nothing.
    """
    token = _ALLOWED.set(allowed or _ALLOWED.get())
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def check_allowed(references: Iterable[str], *, recipe: str) -> None:
    """Refuse a recipe that names code of its own, unless that was allowed.

    Raises:
        UsageError: With the modules that would be imported.
    """
    names = sorted(set(references))
    if names and not code_allowed():
        modules = ", ".join(sorted({name.partition(":")[0] for name in names}))
        raise UsageError(
            f"recipe {recipe!r} names code of its own, {', '.join(names)}; running it "
            f"would import {modules}, with all your rights. If you trust that code, "
            "add --allow-code (in Python: allow_code=True)."
        )


def resolve(reference: str) -> object:
    """Import what ``module:function`` names.

    Raises:
        UsageError: If importing is not allowed here, or finds nothing.
    """
    if not code_allowed():
        raise UsageError(
            f"{reference!r} is code of the recipe's own and was not imported; it runs "
            "only with --allow-code (in Python: noisekit.train.allow_code())."
        )
    module, _, path = reference.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{reference!r} needs to be importable as module:function, got "
            f"{type(error).__name__}: {error}; put the module into the working "
            "folder or on PYTHONPATH."
        ) from error
    return found
