"""Every measure that a recipe can take at a snapshot: sharpness and noise."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from noisekit.core.errors import UsageError
from noisekit.core.references import resolve
from noisekit.core.results import ErrorSource, Estimate
from noisekit.probes import example_sq_norms, gradient_noise
from noisekit.sharpness import (
    SHARPNESS_MEASURES,
    Measure,
    Measurement,
    MeasurementContext,
)


@dataclass(frozen=True, kw_only=True)
class SimpleNoiseScale(Measure):
    """The simple noise scale with both of its parts; it has no settings."""

    name = "simple_noise_scale"
    description = "the simple noise scale from per-example gradients"

    def cost(self) -> int:
        """Return the pass with per-example gradients."""
        return 2

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the parts, then their ratio."""
        risk = context.risk
        noise = gradient_noise(risk.model, risk.loss_fn, risk.batches, bn=risk.bn)
        yield Measurement("variance_trace", noise.variance_trace)
        yield Measurement("debiased_grad_sq_norm", noise.debiased_grad_sq_norm)
        yield Measurement(self.name, noise.simple_noise_scale)


@dataclass(frozen=True, kw_only=True)
class ExampleGradSqNorm(Measure):
    """The squared norm of each example's own gradient; it has no settings."""

    name = "example_grad_sq_norm"
    description = "the squared norms of per-example gradients"

    def cost(self) -> int:
        """Return the pass with per-example gradients."""
        return 2

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the mean, with the norm of each example."""
        risk = context.risk
        norms = example_sq_norms(risk.model, risk.loss_fn, risk.batches, bn=risk.bn)
        norms = norms.cpu().double()
        estimate = Estimate(
            float(norms.mean()),
            stderr=float(norms.std() / len(norms) ** 0.5),
            error_source=ErrorSource.DATA,
            num_samples=len(norms),
            num_grads=1,
        )
        yield Measurement(self.name, estimate, per_example=norms)


MEASURES: Mapping[str, tuple[Measure, ...]] = MappingProxyType(
    {
        **SHARPNESS_MEASURES,
        SimpleNoiseScale.name: (SimpleNoiseScale(),),
        ExampleGradSqNorm.name: (ExampleGradSqNorm(),),
    }
)
"""Every measure by its name, with its usual settings."""


def own_measure(reference: str) -> type[Measure]:
    """Import a user's own measure, ``module:Class``.

    Raises:
        UsageError: If importing is not allowed here, or it is no measure.
    """
    found = resolve(reference)
    if not isinstance(found, type) or not issubclass(found, Measure):
        raise UsageError(
            f"{reference!r} needs to be a subclass of noisekit.Measure, got {found!r}."
        )
    return found
