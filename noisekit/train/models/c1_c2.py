"""Keskar's convolutional networks: shallow C1 and C3, deep C2 and C4."""

from collections.abc import Iterator
from typing import Literal

from torch import nn

from noisekit.train.models.convolutional import check_images, dense_layers
from noisekit.train.models.section import NetworkSection

_C1_CHANNELS = 64
_C1_HIDDEN = (384, 192)
_C2_BLOCKS: tuple[tuple[tuple[int, float], ...], ...] = (
    ((64, 0.3), (64, 0.0)),
    ((128, 0.4), (128, 0.0)),
    ((256, 0.4), (256, 0.4), (256, 0.0)),
    ((512, 0.4), (512, 0.4), (512, 0.0)),
    ((512, 0.4), (512, 0.4), (512, 0.0)),
)
"""Channels of each 3x3 convolution, and the dropout that follows it."""
_DROPOUT = 0.5


class C1(NetworkSection):
    """Keskar's C1: two 5x5 convolutions of 64 channels, dense 384 and 192.

    Each layer is followed by BatchNorm and ReLU; convolutions by a 3x3 pool of stride
    2, dense layers by dropout of one half. C3 is the same network on CIFAR-100.

    Attributes:
        dropout: Whether dense layers have dropout.

    Source:
        Keskar et al. 2017, arXiv:1609.04836, appendix B, and the authors' code.
    """

    name: Literal["c1", "c3"] = "c1"
    dropout: bool = True

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        """Return the network for images of shape (channels, height, width)."""
        channels, height, width = check_images(self.name, input_shape)
        layers: list[nn.Module] = []
        for before in (channels, _C1_CHANNELS):
            layers += _convolution(before, _C1_CHANNELS, kernel=5, dropout=0.0)
            layers.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
            height, width = (height + 1) // 2, (width + 1) // 2
        widths = (_C1_CHANNELS * height * width, *_C1_HIDDEN)
        dropout = _DROPOUT if self.dropout else 0.0
        dense = dense_layers(widths, num_classes, batch_norm=True, dropout=dropout)
        return nn.Sequential(*layers, nn.Flatten(), *dense)


class C2(NetworkSection):
    """Keskar's C2: thirteen 3x3 convolutions in five blocks, and a dense layer of 512.

    BatchNorm and ReLU after each, dropout of .3 to .5 in between. C4 is the same
    network on CIFAR-100.

    Attributes:
        dropout: Whether there is dropout.

    Source:
        Keskar et al. 2017, arXiv:1609.04836, appendix B, and the authors' code.
    """

    name: Literal["c2", "c4"] = "c2"
    dropout: bool = True

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        """Return the network for images of at least 32x32."""
        before, height, width = check_images(self.name, input_shape, smallest=32)
        layers: list[nn.Module] = []
        for block in _C2_BLOCKS:
            for channels, dropout in block:
                dropout = dropout if self.dropout else 0.0
                layers += _convolution(before, channels, kernel=3, dropout=dropout)
                before = channels
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        dropout = _DROPOUT if self.dropout else 0.0
        if dropout:
            layers.append(nn.Dropout(dropout))
        widths = (before * height * width, 512)
        dense = dense_layers(widths, num_classes, batch_norm=True, dropout=dropout)
        return nn.Sequential(*layers, nn.Flatten(), *dense)


def _convolution(
    before: int, after: int, *, kernel: int, dropout: float
) -> Iterator[nn.Module]:
    yield nn.Conv2d(before, after, kernel, padding=kernel // 2)
    yield nn.BatchNorm2d(after)
    yield nn.ReLU()
    if dropout:
        yield nn.Dropout(dropout)
