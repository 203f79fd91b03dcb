"""Recipes, data, networks, the training loop, and sweeps over both."""

from noisekit.train.catalogue import (
    AnalysisEntry,
    ExperimentEntry,
    ProfileEntry,
    analyses,
    experiments,
    find_analysis,
    find_recipe,
    write_starter_recipe,
)
from noisekit.train.cost import Cost, estimate_cost
from noisekit.train.datasets import DataSplits, TensorPair, load_data
from noisekit.train.loading import load_recipe
from noisekit.train.models import build_model
from noisekit.train.progress import Progress, ProgressEvent
from noisekit.train.recipe import Recipe
from noisekit.train.revisit import Revisited, revisit
from noisekit.train.specs import RunSpec
from noisekit.train.standing import RunStanding, recorded_recipe, status
from noisekit.train.sweep import resume, run

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
    "RunSpec",
    "RunStanding",
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
