"""Rescalings that keep a network's function, as functions of one factor."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import batch_norms, unwrap_compiled
from noisekit.sharpness.rescaling.chains import (
    FreeScale,
    free_scales,
    layers_before_norms,
)
from noisekit.sharpness.rescaling.rescaling import Rescaling, apply_rescaling

RescaleFn = Callable[[nn.Module, float], Mapping[str, Tensor] | nn.Module | None]
"""Rescales a copy of a model by a factor: in place, or by returning the new state
dict or another model."""


def free_rescalings(
    model: nn.Module, batch: Batch, *, generator: torch.Generator
) -> dict[str, RescaleFn]:
    """Return the rescalings that are known to keep a model's function, by name.

    ``"layers"``: in a chain of layers with ReLU-like ones between, each layer's output
    is multiplied by the factor and the next layer's columns are divided by it.
    ``"neurons"``: the same with a factor per neuron, ``factor ** u`` with ``u`` drawn
    once, uniform from -1 to 1. ``"batch_norm"``: layers whose output goes straight
    into a BatchNorm, in any model, are multiplied by the factor.

    Args:
        model: The network; not changed.
        batch: Data to run it on once, which shows what feeds a BatchNorm.
        generator: Source of the neurons' exponents.

    Raises:
        UsageError: If none is known.
    """
    between, reason = _between_weights(model)
    result: dict[str, RescaleFn] = {}
    if between:
        exponents = [
            2 * torch.rand(s.num_channels, generator=generator, device=generator.device)
            - 1
            for s in between
        ]
        same = [torch.ones_like(e) for e in exponents]
        result["layers"] = _power(between, same)
        result["neurons"] = _power(between, exponents)
    before_norms = layers_before_norms(model, batch) if batch_norms(model) else []
    if before_norms:
        ones = [torch.ones(s.num_channels) for s in before_norms]
        result["batch_norm"] = _power(before_norms, ones)
    if not result:
        raise UsageError(
            f"{reason} Or pass rescalings={{name: function}} with a function(copy, "
            "factor) that rescales a copy of the model."
        )
    return result


def rescaled_by(copy: nn.Module, rescale: RescaleFn, factor: float) -> nn.Module:
    """Return what a rescaling makes of a copy.

    Raises:
        UsageError: If it returns something else than a state dict, a model or nothing.
    """
    result = rescale(copy, factor)
    if result is None:
        return copy
    if isinstance(result, nn.Module):
        return result
    if not isinstance(result, Mapping):
        raise UsageError(
            "a rescaling needs to return nothing, a state dict or a model, got a "
            f"{type(result).__name__}."
        )
    copy.load_state_dict(dict(result))
    return copy


def _between_weights(model: nn.Module) -> tuple[list[FreeScale], str]:
    """Free scales between two layers of weights, and why there is none."""
    try:
        scales = free_scales(unwrap_compiled(model))
    except UsageError as error:
        return [], str(error)
    result = [scale for scale in scales if scale.sink_weight is not None]
    return result, "a rescaling needs two layers of weights in a row."


def _power(scales: list[FreeScale], exponents: list[Tensor]) -> RescaleFn:
    def rescale(copy: nn.Module, factor: float) -> None:
        like = next(copy.parameters())
        rescaling = Rescaling({})
        for scale, exponent in zip(scales, exponents, strict=True):
            factors = (factor ** exponent.double()).to(like.device, like.dtype)
            rescaling = rescaling.then(scale.rescaling(factors))
        apply_rescaling(copy, rescaling)

    return rescale
