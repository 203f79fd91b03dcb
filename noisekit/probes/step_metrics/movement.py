"""How far a step moves the parameters, and how the gradient turns.

Each of ``update_size`` and ``distance_from_start`` holds one copy of the parameters,
``gradient_cosine`` two of the gradient; a comparison holds one more while it runs.
"""

import torch
from torch import Tensor

from noisekit.core.layers.rule import widen
from noisekit.core.reductions import inner_product, sq_norms
from noisekit.core.results import Unavailable
from noisekit.noise.step_quantity import StepQuantity
from noisekit.probes.capture.step_record import StepRecord
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.step_metrics.metric import MetricStep, State, StepMetric


class _Distance(StepMetric):
    """The parameters' distance from a copy of them, in total and each."""

    def set_up(self, context: ProbeContext) -> None:
        """Hold no copy yet."""
        self._parameters: list[Tensor] = list(context.recorder.parameters)
        self._origin: list[Tensor] = []
        self._reason = "the parameters before the step were not seen"

    @torch.no_grad()
    def _keep(self) -> None:
        """Copy the parameters as they are now."""
        if self._origin:
            torch._foreach_copy_(self._origin, self._parameters)
        else:
            self._origin = [widen(p.detach()).clone() for p in self._parameters]

    @torch.no_grad()
    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return the squared distance of every parameter ``(Q,)``."""
        if not self._origin:
            return Unavailable(self._reason)
        now = [widen(parameter.detach()) for parameter in self._parameters]
        return {"squares": sq_norms(torch._foreach_sub(now, self._origin))}

    def value(self, step: MetricStep) -> StepQuantity:
        """Return the distances."""
        squares = step.tensor("squares")
        return StepQuantity(torch.cat((squares.sum().reshape(1), squares)).sqrt())


class UpdateSize(_Distance):
    """``|w_{t+1} - w_t|``."""

    name = "update_size"

    def before_step(self) -> None:
        """Keep the parameters that the step starts from."""
        self._keep()


class DistanceFromStart(_Distance):
    """``|w_t - w_0|``, where the probe has seen the start."""

    name = "distance_from_start"

    def set_up(self, context: ProbeContext) -> None:
        """Keep the parameters as they are."""
        super().set_up(context)
        self._keep()

    def resume(self) -> None:
        """Forget parameters that are not the start's."""
        self._origin = []
        self._reason = "training had begun before the probe was attached"


class GradientCosine(StepMetric):
    """Cosine between the gradients of this and of the last step that was read."""

    name = "gradient_cosine"

    def set_up(self, context: ProbeContext) -> None:
        """Hold no gradient yet."""
        self._parameters: list[Tensor] = list(context.recorder.parameters)
        self._gradient: list[Tensor] = []
        self._last: list[Tensor] = []
        self._seen = False

    @torch.no_grad()
    def on_gradient(self, record: StepRecord) -> None:
        """Keep the gradient as a backward pass has left it, before any clipping."""
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
    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return ``<a, b>``, ``|a|²`` and ``|b|²`` per parameter ``(Q, 3)``."""
        if not self._seen:
            return Unavailable("no backward pass has left this gradient")
        last, now = self._last, self._gradient
        self._last, self._gradient = now, last
        self._seen = False
        if not last:
            return Unavailable(
                "there is no earlier reading to compare the gradient with"
            )
        pairs = zip(now, last, strict=True)
        return {"products": torch.stack([_products(a, b) for a, b in pairs])}

    def value(self, step: MetricStep) -> StepQuantity:
        """Return the cosines, in total and of each parameter."""
        products = step.tensor("products")
        products = torch.cat((products.sum(0, keepdim=True), products))
        across, own, others = products.unbind(1)
        # The roots apart: a product of two squared norms underflows.
        return StepQuantity(across / (own.sqrt() * others.sqrt()))


def _products(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([inner_product(*pair) for pair in ((a, b), (a, a), (b, b))])
