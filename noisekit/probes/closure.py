"""The closure check: per-example contributions must add up to the gradient."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from noisekit.core.layer_rules import LayerCall
from noisekit.core.per_example import Site, summed_grads

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}
_HALF_TOLERANCE = 2e-2
"""Relative to ``sqrt(n sum |u_i|²)``, which bounds the rounding of the sum."""


class ClosureCheck:
    """Compares ``sum_i u_i`` with the change of ``.grad``, parameter by parameter.

    A weight used behind its module's back, a penalty added to the loss or a wrong
    batch axis shows up here. One instance is one backward pass.
    """

    def __init__(self) -> None:
        self._before: dict[int, Tensor | None] = {}
        self._excess: dict[int, Tensor] = {}

    def note(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember the gradients before this backward pass adds to them."""
        for parameter in parameters.values():
            if id(parameter) not in self._before:
                grad = parameter.grad
                kept = None if grad is None else grad.detach().clone()
                self._before[id(parameter)] = kept

    def compare(
        self,
        parameter: nn.Parameter,
        contributions: Sequence[tuple[Site, LayerCall]],
        sq_norms: Tensor,
    ) -> None:
        """Note by how much the sum misses the change, relative to what rounding may."""
        if parameter.grad is None or parameter.is_meta:
            return
        before = self._before.get(id(parameter))
        change = parameter.grad if before is None else parameter.grad - before
        missing = torch.linalg.vector_norm(
            summed_grads(contributions, parameter) - change
        )
        bound = (len(sq_norms) * sq_norms.sum()).sqrt()
        if before is not None:  # the difference carries the rounding of the sum
            bound = bound + torch.linalg.vector_norm(before)
        tolerance = max(_tolerance(call, parameter) for _, call in contributions)
        self._excess[id(parameter)] = missing - tolerance * bound

    def failures(self) -> set[int]:
        """Return the ids of parameters whose sum misses; one transfer to the host."""
        if not self._excess:
            return set()
        excess = torch.stack([e.double() for e in self._excess.values()]).tolist()
        pairs = zip(self._excess, excess, strict=True)
        # Not ``> 0``: a NaN is left to the training, which will see it anyway.
        return {key for key, value in pairs if value > 0}


def _tolerance(call: LayerCall, parameter: nn.Parameter) -> float:
    dtypes = {parameter.dtype, *(g.dtype for g in call.grads if g is not None)}
    return max(_TOLERANCES.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)
