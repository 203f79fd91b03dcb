r"""The closure check: per-example contributions must add up to the gradient.

.. math:: \Big\| \sum_i u_i - \Delta g \Big\| \le \tau \sqrt{n \sum_i \|u_i\|^2}

with ``Δg`` the change of ``.grad`` by the backward pass. The right side bounds the
rounding error of a sum of ``n`` terms: by Cauchy-Schwarz it is at least
:math:`\tau \sum_i \|u_i\|`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from noisekit.core.errors import ClosureError
from noisekit.core.layers.per_example import Site, sum_over_rows, summed_grads
from noisekit.core.layers.rule import LayerCall, added_up

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}
_HALF_TOLERANCE = 2e-2
"""``τ`` by dtype; the last is for half precision."""

_SHARE_OF_ALL = 0.05
"""Added to each bound, relative to the norm of the bounds of all parameters: a gradient
that is zero up to rounding, such as that of the bias of attention's keys, has no
significant digits to compare."""


class ClosureCheck:
    """Compares ``sum_i u_i`` with the change of ``.grad``, parameter by parameter.

    It detects a weight that is used without calling its module, a penalty added to the
    loss, and a wrong batch axis. One instance is one backward pass.
    """

    def __init__(self) -> None:
        self._before: dict[int, Tensor | None] = {}
        self._after: dict[int, Tensor] = {}
        self._missing: dict[int, Tensor] = {}
        self._bounds: dict[int, Tensor] = {}

    def note(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Store the gradients before this backward pass adds to them."""
        for parameter in parameters.values():
            if id(parameter) not in self._before:
                grad = parameter.grad
                kept = None if grad is None else grad.detach().clone()
                self._before[id(parameter)] = kept

    def keep(self, parameter: nn.Parameter) -> None:
        """Store the gradient, before an all-reduce overwrites it."""
        if parameter.grad is not None:
            self._after[id(parameter)] = parameter.grad.detach().clone()

    def compare(
        self,
        parameter: nn.Parameter,
        contributions: Sequence[tuple[Site, LayerCall]],
        sq_norms: Tensor,
        *,
        chunks: Sequence[slice] = (),
        split_from: int | None = 0,
    ) -> None:
        """Store the gap between the sum and the change, and its bound.

        Args:
            parameter: Whose gradient is complete.
            contributions: All calls that it comes from.
            sq_norms: ``|u_i|²`` of every example.
            chunks: The examples of each chunk, where sums over chunks are read too;
                those are computed by other formulas and have to add up as well.
            split_from: First of the examples whose single gradients are added up, which
                detects a wrong split into examples; ``None`` compares one gradient of
                all of them.
        """
        if parameter.grad is None or parameter.is_meta:
            return
        before = self._before.get(id(parameter))
        after = self._after.get(id(parameter), parameter.grad)
        change = after if before is None else after - before
        total = (
            summed_grads(contributions, parameter, split_from)
            if split_from is not None
            else sum_over_rows(contributions, parameter, slice(0, len(sq_norms)))
        )
        missing = torch.linalg.vector_norm(total - change)
        if chunks:
            parts = [sum_over_rows(contributions, parameter, rows) for rows in chunks]
            missing = torch.maximum(
                missing, torch.linalg.vector_norm(added_up(parts) - change)
            )
        bound = (len(sq_norms) * sq_norms.sum()).sqrt()
        if before is not None:  # g + Δg was rounded relative to g
            bound = bound + torch.linalg.vector_norm(before)
        tolerance = max(_tolerance(call, parameter) for _, call in contributions)
        self._missing[id(parameter)] = missing.double()
        self._bounds[id(parameter)] = tolerance * bound.double()

    def failures(self) -> set[int]:
        """Return the ids of parameters that fail; one transfer to the host."""
        if not self._missing:
            return set()
        bounds = torch.stack(list(self._bounds.values()))
        allowed = bounds + _SHARE_OF_ALL * torch.linalg.vector_norm(bounds)
        excess = (torch.stack(list(self._missing.values())) - allowed).tolist()
        pairs = zip(self._missing, excess, strict=True)
        # NaN compares false: a diverged training is not a fault of the probe.
        return {key for key, value in pairs if value > 0}


def _tolerance(call: LayerCall, parameter: nn.Parameter) -> float:
    dtypes = {parameter.dtype, *(g.dtype for g in call.grads if g is not None)}
    return max(_TOLERANCES.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)


def gradient_sum_error(names: str) -> ClosureError:
    """Return the error for parameters whose contributions never add up."""
    return ClosureError(
        "a probe needs per-example gradients that add up to .grad, got another "
        f"gradient for {names}. A penalty on the weights inside the loss, a gradient "
        "penalty or a hook that changes gradients does this; use the optimizer's "
        "weight_decay, or leave these parameters out with params=."
    )
