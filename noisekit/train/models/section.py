"""What every network of a recipe is: a section that can be built."""

from abc import abstractmethod
from typing import ClassVar, Literal

from torch import nn

from noisekit.train.section import PositiveFloat, Section


class NetworkSection(Section):
    """Which network, and how its weights are drawn.

    Attributes:
        name: The network.
        init: PyTorch's own starting weights, He's normal or Glorot's uniform ones.
        init_scale: What the drawn weights of dense layers and convolutions are
            multiplied by; biases are not.
        reads_tokens: Whether inputs are tokens, and not real numbers.
    """

    name: str
    init: Literal["default", "he_normal", "glorot_uniform"] = "default"
    init_scale: PositiveFloat = 1.0

    reads_tokens: ClassVar[bool] = False

    @abstractmethod
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return the network, with weights from PyTorch's global generator."""
