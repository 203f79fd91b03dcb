"""The reduced AlexNet of Masters and Luschi."""

from typing import Literal

from torch import nn

from noisekit.train.models.convolutional import (
    Norm,
    check_images,
    dense_layers,
    norm_of_channels,
)
from noisekit.train.models.section import NetworkSection

_CONVOLUTIONS = ((16, 5), (48, 3), (96, 3), (64, 3), (64, 3))
"""Channels and kernel size of each convolution."""
_POOLED = frozenset({0, 1, 4})
_HIDDEN = (256, 256)


class AlexNet(NetworkSection):
    """Five convolutions of stride 1, and two dense layers of 256.

    The paper states channels, kernels, 3x3 pools of stride 2 and the width of the
    dense layers. That the pools follow convolutions 1, 2 and 5, that they round up,
    and that there are two dense layers is the usual reading of AlexNet.

    Attributes:
        norm: Normalization before each ReLU.

    Source:
        Masters and Luschi 2018, arXiv:1804.07612, section 4.
    """

    name: Literal["alexnet"] = "alexnet"
    norm: Norm = "none"

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        """Return the network for images of shape (channels, height, width)."""
        before, height, width = check_images(self.name, input_shape)
        layers: list[nn.Module] = []
        for place, (channels, kernel) in enumerate(_CONVOLUTIONS):
            layers.append(nn.Conv2d(before, channels, kernel, padding=kernel // 2))
            norm = norm_of_channels(self.norm, channels)
            layers += [nn.ReLU()] if norm is None else [norm, nn.ReLU()]
            if place in _POOLED:
                layers.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
                height, width = (height + 1) // 2, (width + 1) // 2
            before = channels
        dense = dense_layers(
            (before * height * width, *_HIDDEN),
            num_classes,
            batch_norm=self.norm == "batch",
            dropout=0.0,
        )
        return nn.Sequential(*layers, nn.Flatten(), *dense)
