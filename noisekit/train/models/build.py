"""Networks with weights that a seed decides."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import batch_norms
from noisekit.core.randomness import stream_seed
from noisekit.train.models.fully_connected import F1, Mlp
from noisekit.train.models.section import NetworkSection
from noisekit.train.models.small_cnn import SmallCnn
from noisekit.train.references import resolve
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


def _he_normal(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")
