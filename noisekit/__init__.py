"""Gradient-noise and sharpness analysis for PyTorch.

Public names are imported when they are first used, so that ``import noisekit`` costs
nothing and the command line can answer ``--help`` without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from noisekit.core.results import Estimate as Estimate
    from noisekit.core.results import Interval as Interval
    from noisekit.core.results import Status as Status

__version__ = "0.1.0"

_HOME = {
    # results and errors
    "Estimate": "core.results",
    "Interval": "core.results",
    "Status": "core.results",
    "NoisekitError": "core.errors",
    "quantity": "core.vocabulary",
    # data
    "EmpiricalRisk": "core.risk",
    "freeze": "core.risk",
}


def __getattr__(name: str) -> object:
    """Import the public ``name`` from its home on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'noisekit' has no attribute {name!r}")
    value = getattr(import_module(f"noisekit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*_HOME, "__version__"])
