"""What every network of a recipe is: a section that can be built."""

from abc import abstractmethod
from typing import Literal

from torch import nn

from noisekit.train.section import Section


class NetworkSection(Section):
    """Which network, and how its weights are drawn.

    Attributes:
        name: The network.
        init: PyTorch's own starting weights, He's normal or Glorot's uniform ones.
    """

    name: str
    init: Literal["default", "he_normal", "glorot_uniform"] = "default"

    @abstractmethod
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return the network, with weights from PyTorch's global generator."""
