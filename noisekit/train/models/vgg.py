"""VGG-11 with BatchNorm, for images of 32x32 and larger."""

from typing import Literal

from torch import nn

from noisekit.train.models.convolutional import check_images, dense_layers
from noisekit.train.models.section import NetworkSection
from noisekit.train.section import Fraction, PositiveInt

_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
"""Channels of the 3x3 convolutions between two pools."""


class Vgg11(NetworkSection):
    """VGG's configuration A with BatchNorm after each convolution.

    The convolutions are those of torchvision's ``vgg11_bn``. The classifier takes what
    the five pools leave, 512 values of an image of 32x32, as in Keskar's script.

    Attributes:
        hidden: Widths of the classifier's hidden layers.
        dropout: Share of each hidden layer that is dropped.

    Source:
        Simonyan and Zisserman 2015, arXiv:1409.1556, table 1.
    """

    name: Literal["vgg11_bn"] = "vgg11_bn"
    hidden: tuple[PositiveInt, ...] = (4096, 4096)
    dropout: Fraction = 0.5

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        """Return the network for images of at least 32x32."""
        before, height, width = check_images(self.name, input_shape, smallest=32)
        layers: list[nn.Module] = []
        for stage in _STAGES:
            for channels in stage:
                layers += [
                    nn.Conv2d(before, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                before = channels
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        widths = (before * height * width, *self.hidden)
        dense = dense_layers(
            widths, num_classes, batch_norm=False, dropout=self.dropout
        )
        return nn.Sequential(*layers, nn.Flatten(), *dense)
