"""How gradient norms are distributed over a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from noisekit.noise.distribution import LogHistogram
from noisekit.noise.step_quantity import StepQuantity
from noisekit.probes.reading import Reading


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

    def with_step(self, reading: Reading) -> "GradientNorms":
        """Return the distribution with one step counted; nothing is synchronised."""
        batches = self.batches.add(reading.layer_sq_norms.sum().sqrt())
        examples, sq_norms = self.examples, reading.example_sq_norms
        if sq_norms is not None:
            examples = examples.add(sq_norms.sqrt())
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


def spread_of_step(reading: Reading) -> dict[str, StepQuantity] | str:
    """Return quantiles of the step's examples' norms, or why they are not known."""
    sq_norms = reading.example_sq_norms
    if sq_norms is None:
        reason = "the examples' own norms are read by estimator='per_example' only"
        return reading.coverage.reason or reason
    norms = sq_norms.sqrt()
    shares = torch.linspace(0.5, 0.95, 2, dtype=norms.dtype, device=norms.device)
    median, upper = norms.quantile(shares).unbind()
    return {
        "example_grad_norm_median": StepQuantity(median.reshape(1)),
        "example_grad_norm_q95": StepQuantity(upper.reshape(1)),
        "example_grad_norm_max": StepQuantity(norms.max().reshape(1)),
    }
