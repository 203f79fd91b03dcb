"""The networks of the experiments."""

from noisekit.train.models.build import ModelSpec, build_model, uses_batch_norm
from noisekit.train.models.fully_connected import F1, Mlp
from noisekit.train.models.section import NetworkSection
from noisekit.train.models.small_cnn import SmallCnn

__all__ = [
    "F1",
    "Mlp",
    "ModelSpec",
    "NetworkSection",
    "SmallCnn",
    "build_model",
    "uses_batch_norm",
]
