"""What the convolutional networks share: kinds of normalization, checks of shapes."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import nn

from noisekit.core.errors import UsageError

Norm = Literal["none", "batch", "batch_convolutions", "group"]
"""Normalization before each ReLU: none; BatchNorm after every convolution and every
dense layer but the last; BatchNorm after convolutions only; GroupNorm with 8 groups
after convolutions only."""

_GROUPS = 8


def norm_of_channels(norm: Norm, channels: int) -> nn.Module | None:
    """Return the layer that follows a convolution, if any."""
    if norm in ("batch", "batch_convolutions"):
        return nn.BatchNorm2d(channels)
    if norm == "group":
        if channels % _GROUPS:
            raise UsageError(
                f"model.norm = 'group' needs channels in multiples of {_GROUPS}, got "
                f"{channels}; use another width, or norm = 'batch'."
            )
        return nn.GroupNorm(_GROUPS, channels)
    return None


def dense_layers(
    widths: tuple[int, ...], num_classes: int, *, batch_norm: bool, dropout: float
) -> Iterator[nn.Module]:
    """Yield dense layers with ReLU, and the output layer.

    Args:
        widths: Number of inputs, then width of each hidden layer.
        num_classes: Number of outputs.
        batch_norm: Whether BatchNorm precedes each ReLU.
        dropout: Share of each hidden layer that is dropped; 0 adds no layer.
    """
    for before, after in pairwise(widths):
        yield nn.Linear(before, after)
        if batch_norm:
            yield nn.BatchNorm1d(after)
        yield nn.ReLU()
        if dropout:
            yield nn.Dropout(dropout)
    yield nn.Linear(widths[-1], num_classes)


def check_images(
    name: str, shape: tuple[int, ...], *, smallest: int = 1
) -> tuple[int, int, int]:
    """Return the shape of one image.

    Args:
        name: The network, for the message.
        shape: Shape of one example.
        smallest: Least height and width that the network's pooling allows.

    Raises:
        UsageError: If the examples are no images, or too small.
    """
    if len(shape) != 3:
        raise UsageError(
            f"{name} needs images of shape (channels, height, width), got "
            f"examples of shape {shape}; use model.name = 'mlp'."
        )
    channels, height, width = shape
    if min(height, width) < smallest:
        raise UsageError(
            f"{name} needs images of at least {smallest}x{smallest}, got "
            f"{height}x{width}; use larger images, or model.name = 'small_cnn'."
        )
    return channels, height, width
