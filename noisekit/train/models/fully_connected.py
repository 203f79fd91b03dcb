"""Fully connected networks: of any widths, and Keskar's F1."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from noisekit.train.models.section import NetworkSection
from noisekit.train.section import PositiveInt

_F1_HIDDEN = (512,) * 5
_HIDDEN = (128, 128)

Activation = Literal["relu", "tanh", "silu", "gelu", "elu", "sigmoid"]
_ACTIVATIONS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "relu": nn.ReLU,
        "tanh": nn.Tanh,
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "elu": nn.ELU,
        "sigmoid": nn.Sigmoid,
    }
)


class Mlp(NetworkSection):
    """A fully connected network.

    Attributes:
        hidden: Widths of the hidden layers; 128, 128 if left out.
        norm: Normalisation before each activation.
        activation: What follows each hidden layer.
    """

    name: Literal["mlp"] = "mlp"
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = _HIDDEN
    norm: Literal["none", "batch"] = "none"
    activation: Activation = "relu"

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        """Return the network for inputs of any shape, which are flattened."""
        return fully_connected(
            prod(input_shape),
            self.hidden,
            num_classes,
            batch_norm=self.norm == "batch",
            activation=self.activation,
        )


class F1(NetworkSection):
    """Keskar's F1: five hidden layers of 512 with BatchNorm.

    Source:
        Keskar et al. 2017, arXiv:1609.04836, appendix B.
    """

    name: Literal["f1"] = "f1"

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        """Return the network for inputs of any shape, which are flattened."""
        return fully_connected(
            prod(input_shape), _F1_HIDDEN, num_classes, batch_norm=True
        )


def fully_connected(
    num_inputs: int,
    hidden: Sequence[int],
    num_classes: int,
    *,
    batch_norm: bool,
    activation: Activation = "relu",
) -> nn.Sequential:
    """Return a network with BatchNorm before each activation where asked for.

    Inputs of any shape are flattened.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (before, after) in enumerate(
        zip((num_inputs, *hidden), hidden, strict=False), start=1
    ):
        layers[f"linear{i}"] = nn.Linear(before, after)
        if batch_norm:
            layers[f"norm{i}"] = nn.BatchNorm1d(after)
        layers[f"{activation}{i}"] = _ACTIVATIONS[activation]()
    layers["output"] = nn.Linear(hidden[-1], num_classes)
    return nn.Sequential(layers)
