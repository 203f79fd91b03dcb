"""Gradient-noise and sharpness analysis for PyTorch.

Public names are imported when they are first used, so that ``import noisekit`` costs
nothing and the command line can answer ``--help`` without loading PyTorch. The names
and their homes stand in ``__init__.pyi``, which type checkers read too.
"""

import ast
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_HOME = {
    name.asname or name.name: f"{statement.module}"
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(statement, ast.ImportFrom)
    for name in statement.names
}
"""The module that each public name is imported from."""

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    """Import the public ``name`` from its home on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'noisekit' has no attribute {name!r}")
    home = _HOME[name]
    if home == __name__:  # a package of ours, such as ``nk.figures``
        return import_module(f"{home}.{name}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
