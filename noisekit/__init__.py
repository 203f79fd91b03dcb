"""Gradient-noise and sharpness analysis for PyTorch.

Public names are imported when they are first used, so that ``import noisekit`` costs
nothing and the command line can answer ``--help`` without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from noisekit.core.errors import NoisekitError as NoisekitError
    from noisekit.core.results import Estimate as Estimate
    from noisekit.core.results import Interval as Interval
    from noisekit.core.results import Status as Status
    from noisekit.core.risk import EmpiricalRisk as EmpiricalRisk
    from noisekit.core.risk import freeze as freeze
    from noisekit.core.vocabulary import quantity as quantity
    from noisekit.curvature import EigenPairs as EigenPairs
    from noisekit.curvature import HessianOperator as HessianOperator
    from noisekit.curvature import top_eigenpairs as top_eigenpairs
    from noisekit.curvature import trace as trace
    from noisekit.integrations import attach as attach
    from noisekit.probes import Probe as Probe
    from noisekit.probes import Reading as Reading
    from noisekit.probes import example_sq_norms as example_sq_norms
    from noisekit.probes import gradient_noise as gradient_noise
    from noisekit.probes import self_check as self_check
    from noisekit.records import Runs as Runs
    from noisekit.records import open_runs as open_runs
    from noisekit.sharpness import epsilon_sharpness as epsilon_sharpness
    from noisekit.sharpness import gauge_fixed_lambda_max as gauge_fixed_lambda_max
    from noisekit.sharpness import interpolate as interpolate
    from noisekit.sharpness import lambda_max as lambda_max
    from noisekit.sharpness import rescaled_twin as rescaled_twin
    from noisekit.train import Recipe as Recipe
    from noisekit.train import load_recipe as load_recipe
    from noisekit.train import resume as resume
    from noisekit.train import revisit as revisit
    from noisekit.train import run as run

__version__ = "0.1.0"

_HOME = {
    # results, errors, vocabulary
    "Estimate": "core.results",
    "Interval": "core.results",
    "Status": "core.results",
    "NoisekitError": "core.errors",
    "quantity": "core.vocabulary",
    # data
    "EmpiricalRisk": "core.risk",
    "freeze": "core.risk",
    # probes
    "attach": "integrations",
    "gradient_noise": "probes",
    "example_sq_norms": "probes",
    "self_check": "probes",
    "Probe": "probes",
    "Reading": "probes",
    # curvature
    "HessianOperator": "curvature",
    "top_eigenpairs": "curvature",
    "trace": "curvature",
    "EigenPairs": "curvature",
    # sharpness
    "lambda_max": "sharpness",
    "epsilon_sharpness": "sharpness",
    "gauge_fixed_lambda_max": "sharpness",
    "interpolate": "sharpness",
    "rescaled_twin": "sharpness",
    # experiments and their runs
    "load_recipe": "train",
    "run": "train",
    "resume": "train",
    "revisit": "train",
    "Recipe": "train",
    "open_runs": "records",
    "Runs": "records",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    """Import the public ``name`` from its home on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'noisekit' has no attribute {name!r}")
    value = getattr(import_module(f"noisekit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
