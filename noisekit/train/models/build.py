"""Networks with weights that a seed decides."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import batch_norms
from noisekit.core.randomness import stream_seed
from noisekit.core.references import resolve
from noisekit.train.models.alexnet import AlexNet
from noisekit.train.models.c1_c2 import C1, C2
from noisekit.train.models.fully_connected import F1, Mlp
from noisekit.train.models.gpt import Gpt
from noisekit.train.models.resnet import ResNet
from noisekit.train.models.resnet50 import ResNet50
from noisekit.train.models.section import NetworkSection
from noisekit.train.models.small_cnn import SmallCnn
from noisekit.train.models.vgg import Vgg11
from noisekit.train.section import OWN, OwnSection, kind_of


class OwnNetwork(OwnSection, NetworkSection, extra="allow"):
    """The user's own network: ``module:function``, called with the other keys.

    The function, or class, takes the keyword arguments ``input_shape`` and
    ``num_classes`` beside them, and returns a module.
    """

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Call the function."""
        function = resolve(self.name)
        if not callable(function):
            raise UsageError(
                f"model.name = {self.name!r} needs to be a function or a class, got "
                f"{type(function).__name__}."
            )
        network = function(
            input_shape=input_shape, num_classes=num_classes, **self.arguments
        )
        if not isinstance(network, nn.Module):
            raise UsageError(
                f"model.name = {self.name!r} needs to return a torch.nn.Module, got "
                f"{type(network).__name__}."
            )
        return network


ModelSpec = Annotated[
    Annotated[Mlp, Tag("mlp")]
    | Annotated[F1, Tag("f1")]
    | Annotated[SmallCnn, Tag("small_cnn")]
    | Annotated[C1, Tag("c1")]
    | Annotated[C2, Tag("c2")]
    | Annotated[C1, Tag("c3")]
    | Annotated[C2, Tag("c4")]
    | Annotated[AlexNet, Tag("alexnet")]
    | Annotated[ResNet, Tag("resnet")]
    | Annotated[Vgg11, Tag("vgg11_bn")]
    | Annotated[ResNet50, Tag("resnet50")]
    | Annotated[Gpt, Tag("gpt")]
    | Annotated[OwnNetwork, Tag(OWN)],
    Discriminator(kind_of()),
]
"""The table of networks: a new one is a section with ``build``, and a line here."""


def build_model(
    spec: NetworkSection, *, input_shape: Sequence[int], num_classes: int, seed: int
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
        network = spec.build(tuple(input_shape), num_classes)
        _initialise(network, spec.init)
        _scale(network, spec.init_scale)
    finally:
        generator.set_state(before)
    return network


def uses_batch_norm(
    spec: NetworkSection, *, input_shape: Sequence[int], num_classes: int
) -> bool:
    """Whether the network has BatchNorm layers: built without memory, and asked."""
    with torch.device("meta"):
        return bool(batch_norms(spec.build(tuple(input_shape), num_classes)))


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


def _scale(network: nn.Module, factor: float) -> None:
    """Multiply drawn weights; a weight that two layers share counts once."""
    if factor == 1.0:
        return
    weights = {
        id(layer.weight): layer.weight
        for layer in network.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(factor)


def _he_normal(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")
