"""Recipes, data, networks, the training loop, and sweeps over both."""

from noisekit.core.references import allow_code
from noisekit.train.data.datasets import DataSplits, load_data
from noisekit.train.data.section import Pools, TensorPair
from noisekit.train.losses import Loss
from noisekit.train.models import build_model
from noisekit.train.recipes.catalogue import (
    AnalysisEntry,
    ExperimentEntry,
    ProfileEntry,
    analyses,
    experiments,
    find_analysis,
    find_recipe,
    write_starter_recipe,
)
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.progress import Progress, ProgressEvent
from noisekit.train.runs.revisit import Revisited, revisit
from noisekit.train.sweeps.cost import Cost, estimate_cost
from noisekit.train.sweeps.run_status import RunProgress, recorded_recipe, status
from noisekit.train.sweeps.sweep import resume, run

__all__ = [
    "AnalysisEntry",
    "Cost",
    "DataSplits",
    "ExperimentEntry",
    "Loss",
    "Pools",
    "ProfileEntry",
    "Progress",
    "ProgressEvent",
    "Recipe",
    "Revisited",
    "RunProgress",
    "RunSpec",
    "TensorPair",
    "allow_code",
    "analyses",
    "build_model",
    "estimate_cost",
    "experiments",
    "find_analysis",
    "find_recipe",
    "load_data",
    "load_recipe",
    "recorded_recipe",
    "resume",
    "revisit",
    "run",
    "status",
    "write_starter_recipe",
]
