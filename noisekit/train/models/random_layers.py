"""Layers that draw random numbers in training, such as dropout, and their streams."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from noisekit.core.randomness import stream_seed

# Packages whose layers are known to draw by a ``dropout`` or ``p`` above zero only.
_KNOWN = ("torch.nn.", "noisekit.")


def may_draw(model: nn.Module) -> bool:
    """Whether a training pass may draw from PyTorch's global generator.

    PyTorch's own layers draw where their dropout is above zero. Of layers that others
    have written nothing is known, so that they may.
    """
    return any(_layer_may_draw(layer) for layer in model.modules())


def _layer_may_draw(layer: nn.Module) -> bool:
    if isinstance(layer, _DropoutNd):
        return layer.p > 0
    if not type(layer).__module__.startswith(_KNOWN):
        return True
    if isinstance(layer, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return True
    dropout = getattr(layer, "dropout", 0.0)
    return isinstance(dropout, float | int) and dropout > 0


@contextmanager
def seeded_draws(
    seed: int | str, *names: int | str, device: torch.device
) -> Iterator[None]:
    """Seed PyTorch's global generators inside the block, and restore them on exit.

    What layers draw then is a function of ``seed`` and ``names`` alone: a resumed run
    needs no state, and processes that share the work draw as one would.
    """
    number = stream_seed(int(seed), *names)
    cpu = torch.get_rng_state()
    there = None if device.type == "cpu" else torch.get_device_module(device)
    on_device = None if there is None else there.get_rng_state()
    try:
        torch.default_generator.manual_seed(number)
        if there is not None:
            there.manual_seed(number)
        yield
    finally:
        torch.set_rng_state(cpu)
        if there is not None:
            there.set_rng_state(on_device)
