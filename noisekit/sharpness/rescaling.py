"""Factors on weights that leave a network's function as it is."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisekit.core.batches import Batch, tensors_in
from noisekit.core.errors import UsageError
from noisekit.core.mode import (
    BatchNormPolicy,
    call_model,
    evaluation_mode,
    unwrap_compiled,
)
from noisekit.core.params import ParameterLayout
from noisekit.curvature.operator import SymmetricOperator

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


class ScaledOperator(SymmetricOperator):
    """``D H D`` with a diagonal matrix ``D``.

    Where weights ``w`` are replaced by ``w / d`` and the function is kept, this is
    the Hessian of the loss with respect to the new weights.
    """

    def __init__(self, operator: SymmetricOperator, diagonal: Tensor) -> None:
        self._operator = operator
        self._diagonal = diagonal

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the vectors."""
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self._operator.device

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._diagonal * (self._operator @ (self._diagonal * vector))


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
    _apply(twin, rescaling)
    policy: BatchNormPolicy = "batch" if bn == "batch" else "running"
    change = _relative_change(module, twin, batch, policy)
    dtype = next(module.parameters()).dtype
    allowed = _BATCH_TOLERANCE if policy == "batch" else torch.finfo(dtype).eps ** 0.5
    if not change <= allowed:
        raise UsageError(
            "a rescaling needs to keep the function, got outputs that differ by "
            f"{change:.2g} of the largest (allowed: {allowed:.2g}) in "
            f"{type(module).__name__}; one of {', '.join(rescaling.parameters)} "
            "reaches the output by another way as well, such as a skip connection, or "
            "a BatchNorm's eps is not small beside its variance: use a measure that "
            "needs no rescaling."
        )
    return twin, change


def _products(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    result = dict(first)
    for name, factor in second.items():
        result[name] = result[name] * factor if name in result else factor
    return result


@torch.no_grad()
def _apply(model: nn.Module, rescaling: Rescaling) -> None:
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


def _relative_change(
    model: nn.Module, twin: nn.Module, batch: Batch, bn: BatchNormPolicy
) -> float:
    """Largest difference of two models' outputs, relative to the largest output."""
    found = []
    for module in (model, twin):
        with evaluation_mode(module, bn), torch.no_grad():
            outputs = tensors_in(call_model(module, batch[0]))
            found.append(torch.cat([o.double().reshape(-1) for o in outputs]))
    before, after = found
    return float((before - after).abs().max() / before.abs().max())
