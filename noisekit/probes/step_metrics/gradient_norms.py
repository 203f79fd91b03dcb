"""How gradient norms are distributed, in one step and over a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.noise.distribution import LogHistogram
from noisekit.noise.step_quantity import StepQuantity
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.step_metrics.metric import MetricStep, State, StepMetric


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """How gradient norms are distributed over the run so far.

    Attributes:
        examples: Norms ``|g_i|`` of single examples' gradients [loss/param].
        batches: Norms of the steps' gradients [loss/param].
    """

    examples: LogHistogram
    batches: LogHistogram

    def __str__(self) -> str:
        """Write both distributions, a line each."""
        return f"of examples: {self.examples}\nof steps: {self.batches}"

    @classmethod
    def empty(cls, device: torch.device) -> Self:
        """Return the distribution of no norms."""
        nothing = LogHistogram.empty(device=device)
        return cls(nothing, nothing)

    def with_step(
        self, grad_sq_norm: Tensor, example_sq_norms: Tensor | None
    ) -> "GradientNorms":
        """Return the distribution with one step counted; nothing is synchronised."""
        batches, examples = self.batches.add(grad_sq_norm.sqrt()), self.examples
        if example_sq_norms is not None:
            examples = examples.add(example_sq_norms.sqrt())
        return GradientNorms(examples, batches)

    def state_dict(self) -> dict[str, Any]:  # plain values that JSON can hold
        """Return the counts."""
        return {
            name: [histogram.counts.tolist(), int(histogram.num_invalid)]
            for name, histogram in (
                ("examples", self.examples),
                ("batches", self.batches),
            )
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        """Return what gave ``state``."""

        def histogram(name: str) -> LogHistogram:
            counts, invalid = (torch.tensor(v, device=device) for v in state[name])
            bins = LogHistogram.empty(device=device)
            return LogHistogram(bins.low, bins.high, counts, invalid)

        return cls(histogram("examples"), histogram("batches"))


class GradHistogram(StepMetric):
    """Quantiles of the step's examples' norms, and a histogram over the run.

    Attributes:
        norms: The distribution over the run so far.
    """

    name = "grad_histogram"
    quantities = (
        "example_grad_norm_median",
        "example_grad_norm_q95",
        "example_grad_norm_max",
    )
    single_process = "it would count one rank's own examples only"

    def set_up(self, context: ProbeContext) -> None:
        """Begin with no norms."""
        self.norms = GradientNorms.empty(context.recorder.parameters[0].device)

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Count the step in and return the examples' norms."""
        found = isinstance(noise, StepNoise)
        sq_norms = noise.example_sq_norms if isinstance(noise, StepNoise) else None
        self.norms = self.norms.with_step(step.gradient.sum(), sq_norms)
        if sq_norms is not None:
            return {"norms": sq_norms.sqrt()}
        if not found:
            assert isinstance(noise, Unavailable)
            return noise
        return Unavailable(
            "the examples' own norms are read by estimator='per_example' only"
        )

    def value(self, step: MetricStep) -> dict[str, StepQuantity]:
        """Return median, 95 % quantile and maximum."""
        norms = step.tensor("norms")
        shares = torch.linspace(0.5, 0.95, 2, dtype=norms.dtype, device=norms.device)
        values = (*norms.quantile(shares).unbind(), norms.max())
        named = zip(self.quantities, values, strict=True)
        return {name: StepQuantity(value.reshape(1)) for name, value in named}

    def state_dict(self) -> dict[str, Any]:
        """Return the histograms."""
        return self.norms.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same histograms."""
        self.norms = GradientNorms.from_state(state, self.norms.batches.counts.device)
