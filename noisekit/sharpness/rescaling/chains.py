"""Where a chain of layers has a free scale: before BatchNorm, and between layers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import call_model, evaluation_mode, unwrap_compiled
from noisekit.sharpness.rescaling.rescaling import Rescaling

WeightLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_HOMOGENEOUS = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
"""Layers with ``f(c x) = c f(x)`` for every positive factor per channel."""


@dataclass(frozen=True, slots=True)
class FreeScale:
    """One place where channels may be scaled by any positive factors.

    Attributes:
        source: Name of the layer whose output channels are scaled.
        sink: Name of the layer that undoes it: a BatchNorm, or the next weights.
        num_channels: Number of factors.
        sink_weight: The next weights, ``None`` where the sink is a BatchNorm.
        source_names: Parameters of the source, all of which carry the scale.
        source_dims: Their numbers of axes.
    """

    source: str
    sink: str
    num_channels: int
    sink_weight: WeightLayer | None
    source_names: tuple[str, ...]
    source_dims: tuple[int, ...]

    def rescaling(self, factors: Tensor) -> Rescaling:
        """Return the rescaling that multiplies the channels by ``factors``."""
        parameters = {
            name: factors.view(-1, *(1,) * (dims - 1))
            for name, dims in zip(self.source_names, self.source_dims, strict=True)
        }
        if self.sink_weight is None:
            return Rescaling(parameters, {self.sink: factors})
        columns = _per_column(1 / factors, self.sink_weight)
        return Rescaling(parameters | {f"{self.sink}.weight": columns})


def free_scales(model: nn.Module) -> list[FreeScale]:
    """Return where a sequential network has a free scale.

    Known are chains of linear and convolutional layers, optionally each with a
    BatchNorm, with ReLU, LeakyReLU, pooling, flattening and dropout between. Other
    layers, such as GELU, end a stretch; before a BatchNorm there is always one.

    Raises:
        UsageError: If ``model`` is no ``nn.Sequential``, or has no free scale.
    """
    module = unwrap_compiled(model)
    if not isinstance(module, nn.Sequential):
        raise UsageError(
            "function-preserving rescalings are known for nn.Sequential only, got "
            f"{type(module).__name__}; pass the sequential part, or rescale a copy "
            "yourself."
        )
    result = list(_scales_of(list(_flattened(module))))
    if not result:
        names = ", ".join(type(layer).__name__ for _, layer in _flattened(module))
        raise UsageError(
            "a rescaling needs two layers of weights with nothing but ReLU-like "
            "layers between, or a layer of weights before a BatchNorm, got "
            f"{names}; there is no rescaled twin of such a network."
        )
    return result


def layers_before_norms(model: nn.Module, batch: Batch) -> list[FreeScale]:
    """Return the layers whose output goes straight into a BatchNorm, in any model.

    Found by running the model once: the layer's very output is the BatchNorm's input.
    """
    module = unwrap_compiled(model)
    names = {layer: name for name, layer in module.named_modules()}
    made: list[tuple[nn.Module, Tensor, int]] = []
    fed: dict[nn.Module, nn.Module] = {}

    def note_output(layer: nn.Module, inputs: object, output: Tensor) -> None:
        made.append((layer, output, output._version))

    def note_input(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for layer, output, version in made:
            if output is inputs[0] and output._version == version:
                fed[layer] = norm

    handles = [
        layer.register_forward_hook(note_output)
        if isinstance(layer, WEIGHT_LAYERS)
        else layer.register_forward_pre_hook(note_input)
        for layer in names
        if isinstance(layer, (*WEIGHT_LAYERS, _BatchNorm))
    ]
    try:
        with evaluation_mode(module, "running"), torch.no_grad():
            call_model(module, batch[0])
    finally:
        for handle in handles:
            handle.remove()
    return [
        _from_layer(names[layer], layer, sink=names[norm], sink_weight=None)
        for layer, norm in fed.items()
    ]


def _flattened(
    module: nn.Sequential, prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every layer of nested sequentials, with its full name."""
    for name, layer in module.named_children():
        if isinstance(layer, nn.Sequential):
            yield from _flattened(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def _scales_of(layers: list[tuple[str, nn.Module]]) -> Iterator[FreeScale]:
    """Yield free scales along the chain, keeping the layer whose scale is open."""
    open_name: str = ""
    open_layer: nn.Module | None = None
    for name, layer in layers:
        if isinstance(layer, WEIGHT_LAYERS):
            if open_layer is not None:
                yield _from_layer(open_name, open_layer, sink=name, sink_weight=layer)
            open_name, open_layer = name, layer
        elif isinstance(layer, _BatchNorm):
            if isinstance(open_layer, WEIGHT_LAYERS):
                yield _from_layer(open_name, open_layer, sink=name, sink_weight=None)
            open_name, open_layer = (name, layer) if layer.affine else ("", None)
        elif not isinstance(layer, _HOMOGENEOUS):
            open_name, open_layer = "", None


def _from_layer(
    name: str, layer: nn.Module, *, sink: str, sink_weight: WeightLayer | None
) -> FreeScale:
    own = dict(layer.named_parameters(recurse=False))
    return FreeScale(
        source=name,
        sink=sink,
        num_channels=len(own["weight"]),
        sink_weight=sink_weight,
        source_names=tuple(f"{name}.{key}" for key in own),
        source_dims=tuple(parameter.ndim for parameter in own.values()),
    )


def _per_column(factors: Tensor, layer: WeightLayer) -> Tensor:
    """Factors of the input channels, in the shape of the layer's weight."""
    if isinstance(layer, nn.Linear):
        # Flattening puts the positions of a channel side by side.
        return factors.repeat_interleave(layer.in_features // len(factors))
    groups = factors.view(layer.groups, 1, -1)
    rows = groups.expand(-1, layer.out_channels // layer.groups, -1).flatten(0, 1)
    return rows.reshape(*rows.shape, *(1,) * (layer.weight.ndim - 2))
