"""The networks of the experiments, with weights that a seed decides."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream_seed
from noisekit.train.recipes.subjects import ModelSpec

_F1_HIDDEN = (512,) * 5
_MLP_HIDDEN = (128, 128)
_CNN_WIDTH = 16


def build_model(
    spec: ModelSpec, *, input_shape: Sequence[int], num_classes: int, seed: int
) -> nn.Module:
    """Return the network with the starting weights of ``seed``, on the CPU.

    The same seed gives the same weights in every arm, so that arms are paired; the
    global random state is not touched.

    Args:
        spec: Which network.
        input_shape: Shape of one example, such as ``(1, 28, 28)``.
        num_classes: Number of outputs.
        seed: Seed of the run.
    """
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(stream_seed(seed, "init"))
        network = _network(spec, tuple(input_shape), num_classes)
        _initialise(network, spec.init)
    finally:
        generator.set_state(before)
    return network


def _network(spec: ModelSpec, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    if spec.name == "f1":
        return fully_connected(prod(input_shape), _F1_HIDDEN, classes, batch_norm=True)
    batch_norm = spec.norm == "batch"
    if spec.name == "mlp":
        hidden = spec.hidden or _MLP_HIDDEN
        return fully_connected(
            prod(input_shape), hidden, classes, batch_norm=batch_norm
        )
    if len(input_shape) != 3:
        raise UsageError(
            "small_cnn needs images of shape (channels, height, width), got examples "
            f"of shape {input_shape}; use model.name = 'mlp'."
        )
    width = spec.width or _CNN_WIDTH
    return small_cnn(input_shape, width, classes, batch_norm=batch_norm)


def fully_connected(
    num_inputs: int, hidden: Sequence[int], num_classes: int, *, batch_norm: bool
) -> nn.Sequential:
    """Return a ReLU network; with 5 layers of 512 and BatchNorm it is Keskar's F1.

    Inputs of any shape are flattened.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (before, after) in enumerate(
        zip((num_inputs, *hidden), hidden, strict=False), start=1
    ):
        layers[f"linear{i}"] = nn.Linear(before, after)
        if batch_norm:
            layers[f"norm{i}"] = nn.BatchNorm1d(after)
        layers[f"relu{i}"] = nn.ReLU()
    layers["output"] = nn.Linear(hidden[-1], num_classes)
    return nn.Sequential(layers)


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


def _initialise(network: nn.Module, init: str) -> None:
    """Draw weights anew, biases zero; ``default`` keeps what PyTorch drew."""
    if init == "default":
        return
    draw: Callable[[Tensor], Tensor] = (
        _he_normal if init == "he_normal" else nn.init.xavier_uniform_
    )
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _he_normal(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")
