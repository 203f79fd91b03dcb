"""Keskar's shallow convolutional network C1, at any width."""

from collections import OrderedDict
from typing import Literal

from torch import nn

from noisekit.train.models.convolutional import check_images
from noisekit.train.models.fully_connected import fully_connected
from noisekit.train.models.section import NetworkSection
from noisekit.train.section import PositiveInt


class SmallCnn(NetworkSection):
    """Two convolutions and two dense layers: C1 at another width.

    Attributes:
        width: Channels of the convolutions; C1 has 64.
        norm: Normalisation before each ReLU.
    """

    name: Literal["small_cnn"] = "small_cnn"
    width: PositiveInt = 16
    norm: Literal["none", "batch"] = "none"

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        """Return the network for images of shape (channels, height, width)."""
        shape = check_images(self.name, input_shape)
        return small_cnn(
            shape, self.width, num_classes, batch_norm=self.norm == "batch"
        )


def small_cnn(
    input_shape: tuple[int, int, int], width: int, num_classes: int, *, batch_norm: bool
) -> nn.Sequential:
    """Return Keskar's shallow convolutional network C1 at ``width`` instead of 64.

    Two 5x5 convolutions, each with a 3x3 pool of stride 2, then dense layers of
    ``6 width`` and ``3 width``. Left out is C1's dropout, under which a training loss
    at fixed weights is not one number.

    Source:
        Keskar et al. 2017, arXiv:1609.04836, appendix B, and the authors' code.
    """
    channels, height, breadth = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, before in enumerate((channels, width), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, width, kernel_size=5, padding=2)
        if batch_norm:
            layers[f"norm{i}"] = nn.BatchNorm2d(width)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        height, breadth = (height + 1) // 2, (breadth + 1) // 2
    dense = fully_connected(
        width * height * breadth,
        (6 * width, 3 * width),
        num_classes,
        batch_norm=batch_norm,
    )
    return nn.Sequential(OrderedDict([*layers.items(), ("dense", dense)]))
