"""Factors on weights that leave a network's function as it is."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisekit.core.batches import Batch, tensors_in
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import (
    BatchNormPolicy,
    call_model,
    evaluation_mode,
    unwrap_compiled,
)
from noisekit.core.params import ParameterLayout

_BATCH_TOLERANCE = 1e-2
"""How much BatchNorm's constant may change outputs where statistics are the batch's."""


@dataclass(frozen=True, slots=True)
class Rescaling:
    """Positive factors for parameters, and for what reaches BatchNorm layers.

    Attributes:
        parameters: Factors by parameter name, of a shape that broadcasts to it.
        norms: Factors per channel of the input of BatchNorm layers, by module name;
            their running statistics follow.
    """

    parameters: Mapping[str, Tensor]
    norms: Mapping[str, Tensor] = field(default_factory=dict)

    def then(self, other: "Rescaling") -> "Rescaling":
        """Return both, one after the other."""
        return Rescaling(
            _products(self.parameters, other.parameters),
            _products(self.norms, other.norms),
        )

    def vector(self, layout: ParameterLayout) -> Tensor:
        """Return the factor of every parameter of ``layout``, as one flat vector."""
        ones = torch.ones(layout.num_params, dtype=layout.dtype, device=layout.device)
        for name, part in zip(layout.names, layout.split(ones), strict=True):
            if name in self.parameters:
                part.mul_(self.parameters[name])
        return ones


def rescaled_copy(
    model: nn.Module,
    rescaling: Rescaling,
    *,
    batch: Batch,
    bn: BatchNormPolicy = "running",
) -> tuple[nn.Module, float]:
    """Return a rescaled copy of a model, and by how much its outputs differ.

    Args:
        model: The model; not changed.
        rescaling: The factors.
        batch: Data on which both must agree.
        bn: What BatchNorm normalises with while they are compared.

    Returns:
        The copy, and the largest difference relative to the largest output.

    Raises:
        UsageError: If the outputs differ by more than rounding.
    """
    module = unwrap_compiled(model)
    twin = copy.deepcopy(module)
    apply_rescaling(twin, rescaling)
    names = ", ".join(rescaling.parameters)
    return twin, verified_change(module, twin, [batch], bn=bn, what=names)


def verified_change(
    model: nn.Module,
    twin: nn.Module,
    batches: Iterable[Batch],
    *,
    bn: BatchNormPolicy,
    what: str,
) -> float:
    """Return the largest difference of outputs, relative to the largest output.

    Args:
        model: The original.
        twin: What should have the same function.
        batches: Data on which both must agree.
        bn: What BatchNorm normalises with while they are compared.
        what: What was rescaled, for the message.

    Raises:
        UsageError: If the outputs differ by more than rounding.
    """
    policy: BatchNormPolicy = "batch" if bn == "batch" else "running"
    differences, largest = [], 0.0
    for batch in batches:
        before = _outputs(model, batch, policy)
        after = _outputs(twin, batch, policy)
        differences.append((before - after).abs().max())
        largest = max(largest, float(before.abs().max()))
    difference = float(torch.stack(differences).max())
    if not math.isfinite(difference):
        raise UsageError(
            f"a rescaled copy needs finite outputs to compare, got a difference of "
            f"{difference}; look for NaN in the batches and the weights."
        )
    change = difference / largest if difference else 0.0
    dtype = next(model.parameters()).dtype
    allowed = _BATCH_TOLERANCE if policy == "batch" else torch.finfo(dtype).eps ** 0.5
    if not change <= allowed:
        raise UsageError(
            "a rescaling needs to keep the function, got outputs that differ by "
            f"{change:.2g} of the largest (allowed: {allowed:.2g}) in "
            f"{type(model).__name__}; one of {what} reaches the output by another way "
            "as well, such as a skip connection, or a BatchNorm's eps is not small "
            "beside its variance: use a measure that needs no rescaling."
        )
    return change


def _products(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    result = dict(first)
    for name, factor in second.items():
        result[name] = result[name] * factor if name in result else factor
    return result


@torch.no_grad()
def apply_rescaling(model: nn.Module, rescaling: Rescaling) -> None:
    """Multiply a model's parameters and running statistics, in place."""
    for name, factor in rescaling.parameters.items():
        model.get_parameter(name).mul_(factor)
    for name, factor in rescaling.norms.items():
        norm = model.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.mul_(factor)
            # The constant that is added to the variance does not scale, so the
            # variance takes that up; it may become a little negative by it.
            variance = (norm.running_var + norm.eps) * factor**2 - norm.eps
            norm.running_var.copy_(variance)


def _outputs(model: nn.Module, batch: Batch, bn: BatchNormPolicy) -> Tensor:
    with evaluation_mode(model, bn), torch.no_grad():
        outputs = tensors_in(call_model(model, batch[0]))
        return torch.cat([o.double().reshape(-1) for o in outputs])
