"""The networks of the experiments."""

from noisekit.train.models.alexnet import AlexNet
from noisekit.train.models.build import (
    ModelSpec,
    build_model,
    uses_batch_norm,
)
from noisekit.train.models.c1_c2 import C1, C2
from noisekit.train.models.fully_connected import F1, Mlp
from noisekit.train.models.gpt import Gpt
from noisekit.train.models.resnet import ResNet
from noisekit.train.models.resnet50 import ResNet50
from noisekit.train.models.section import NetworkSection
from noisekit.train.models.small_cnn import SmallCnn
from noisekit.train.models.vgg import Vgg11

__all__ = [
    "C1",
    "C2",
    "F1",
    "AlexNet",
    "Gpt",
    "Mlp",
    "ModelSpec",
    "NetworkSection",
    "ResNet",
    "ResNet50",
    "SmallCnn",
    "Vgg11",
    "build_model",
    "uses_batch_norm",
]
