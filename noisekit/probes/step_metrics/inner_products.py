"""Criteria from every example's inner product with the step's gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from noisekit.core.results import Unavailable
from noisekit.noise.step_quantity import StepQuantity
from noisekit.noise.step_statistics import (
    inner_product_statistic,
    orthogonality_statistic,
)
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import CapturedCall
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.step_metrics.metric import (
    MetricStep,
    State,
    StepCapture,
    StepMetric,
    call_fault,
)


class ExampleProducts(StepCapture):
    """``<u_i, .grad>`` of every example, per parameter."""

    def __init__(self, context: ProbeContext) -> None:
        self._parameters = context.recorder.parameters

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the layers' calls."""
        recorder.wanted.examples = True

    def on_calls(self, index: int, calls: Sequence[CapturedCall]) -> None:
        """Multiply the examples' gradients of a parameter with its whole gradient."""
        products = calls[0].forward_pass.gathered.setdefault(self, {})
        products[index] = _inner_products(calls, self._parameters[index])

    def state(self, step: StepInputs) -> State | Unavailable:
        """Return the products in total and per parameter ``(1 + Q, n)``."""
        fault = call_fault(step)
        if fault:
            return fault
        if len(step.passes) > 1:
            return Unavailable(
                "the step's gradient is known only after its last micro-batch, when "
                "the examples of earlier ones are gone"
            )
        products = step.passes[0].gathered[self]
        nothing = torch.zeros_like(next(iter(products.values())))
        rows = torch.stack(
            [products.get(i, nothing) for i in range(len(step.gradient))]
        )
        products = torch.cat((rows.sum(0, keepdim=True), rows))
        return {"products": products, "share": step.weights.example_sq_sum}


def _inner_products(calls: Sequence[CapturedCall], parameter: nn.Parameter) -> Tensor:
    """``<u_i, .grad>`` of one parameter, all its calls together ``(n,)``."""
    grad = parameter.grad
    assert grad is not None
    parts = [
        captured.site.rule.inner_products(
            captured.call, {captured.site.name_of(parameter): grad}
        )
        for captured in calls
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class InnerProductTest(StepMetric):
    """``θ`` with which the batch passes the inner-product test just so."""

    name = "inner_product_test"
    single_process = (
        "the applied gradient is known only after its reduction, when the ranks' "
        "examples are gone"
    )

    def set_up(self, context: ProbeContext) -> None:
        """Have the inner products captured."""
        self._products = context.shared(ExampleProducts)

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return the products and the examples' weight."""
        return self._products.state(step)

    def value(self, step: MetricStep) -> StepQuantity | Unavailable:
        """Return the statistic."""
        products = step.tensor("products")
        return StepQuantity(inner_product_statistic(products, step.state["share"]))


class OrthogonalityTest(InnerProductTest):
    """``ν`` with which the batch passes the orthogonality test just so."""

    name = "orthogonality_test"

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the examples' norms too."""
        recorder.units.request.per_example = True

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return the squared norms' sums as well."""
        state = self._products.state(step)
        if isinstance(state, Unavailable):
            return state
        norms = step.passes[0].sq_norms
        nothing = torch.zeros_like(next(iter(norms.values())))
        count = len(step.gradient)
        sums = torch.stack([norms.get(i, nothing).sum() for i in range(count)])
        return {**state, "sq_norms": torch.cat((sums.sum(0, keepdim=True), sums))}

    def value(self, step: MetricStep) -> StepQuantity | Unavailable:
        """Return the statistic."""
        sq_norms, products = step.tensor("sq_norms"), step.tensor("products")
        share = step.state["share"]
        return StepQuantity(orthogonality_statistic(sq_norms, products, share))
