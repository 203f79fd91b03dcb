"""Recipes, data, networks, the training loop, and sweeps over both."""

from noisekit.train.data.datasets import DataSplits, TensorPair, load_data
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
    "ProfileEntry",
    "Progress",
    "ProgressEvent",
    "Recipe",
    "Revisited",
    "RunProgress",
    "RunSpec",
    "TensorPair",
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
