"""How far a step moves the parameters, and how the gradient turns."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from noisekit.core.layers.rule import widen
from noisekit.core.reductions import inner_product, sq_norms
from noisekit.noise.step_quantity import StepQuantity


class Movement:
    """Keeps copies of parameters and gradients to compare later ones with.

    Each of ``update_size`` and ``distance_from_start`` keeps one copy of the
    parameters, and ``gradient_cosine`` two of the gradient; none is made unless asked
    for. A comparison holds one more for as long as it takes.
    """

    def __init__(
        self, names: Collection[str], parameters: Sequence[nn.Parameter]
    ) -> None:
        """Copy the parameters as they are now, where the start is asked for."""
        self._names = frozenset(names)
        self._parameters: list[Tensor] = list(parameters)
        self._before: list[Tensor] = []
        self._start: list[Tensor] = []
        self._gradient: list[Tensor] = []
        self._last_gradient: list[Tensor] = []
        self._resumed, self._seen = False, False
        if "distance_from_start" in self._names:
            self._start = self._copies()

    def resume(self) -> None:
        """Note that training began before these parameters were seen."""
        self._resumed = True

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep the parameters that the step starts from."""
        if "update_size" not in self._names:
            return
        if self._before:
            torch._foreach_copy_(self._before, self._parameters)
        else:
            self._before = self._copies()

    @torch.no_grad()
    def gradient_ready(self) -> None:
        """Keep the gradient as a backward pass has left it, before any clipping."""
        if "gradient_cosine" not in self._names:
            return
        self._seen = True
        grads = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach()
            for p in self._parameters
        ]
        if self._gradient:
            torch._foreach_copy_(self._gradient, grads)
        else:
            self._gradient = [widen(grad).clone() for grad in grads]

    @torch.no_grad()
    def after_step(self) -> dict[str, StepQuantity | str]:
        """Return what the step has done, or why that is not known."""
        found: dict[str, StepQuantity | str] = {}
        if "update_size" in self._names:
            found["update_size"] = self._distance(self._before, "")
        if "distance_from_start" in self._names:
            reason = "training had begun before the probe was attached"
            found["distance_from_start"] = self._distance(
                self._start, reason if self._resumed else ""
            )
        if "gradient_cosine" in self._names:
            found["gradient_cosine"] = self._cosine()
        return found

    def _copies(self) -> list[Tensor]:
        return [widen(p.detach()).clone() for p in self._parameters]

    def _distance(self, origin: list[Tensor], reason: str) -> StepQuantity | str:
        if reason or not origin:
            return reason or "the parameters before the step were not seen"
        now = [widen(parameter.detach()) for parameter in self._parameters]
        squares = sq_norms(torch._foreach_sub(now, origin))
        return StepQuantity(torch.cat((squares.sum().reshape(1), squares)).sqrt_())

    def _cosine(self) -> StepQuantity | str:
        if not self._seen:
            return "no backward pass has left this gradient"
        last, now = self._last_gradient, self._gradient
        self._last_gradient, self._gradient = now, last
        self._seen = False
        if not last:
            return "there is no earlier reading to compare the gradient with"
        parts = torch.stack([_products(a, b) for a, b in zip(now, last, strict=True)])
        parts = torch.cat((parts.sum(0, keepdim=True), parts))
        across, own, others = parts.unbind(1)
        # The roots apart: a product of two squared norms underflows.
        return StepQuantity(across / (own.sqrt() * others.sqrt()))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``<a, b>``, ``|a|²`` and ``|b|²``."""
    return torch.stack([inner_product(*pair) for pair in ((a, b), (a, a), (b, b))])
