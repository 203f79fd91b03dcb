"""Optional quantities of one optimizer step, as a reading holds them."""

from dataclasses import dataclass, field

from torch import Tensor

from noisekit.core.results import Estimate
from noisekit.noise.hessian_noise import HessianNoiseScale, hessian_noise_scale


@dataclass(frozen=True, slots=True)
class StepQuantity:
    """One quantity of one step, in total and, where it has a meaning, per parameter.

    Attributes:
        values: The total first, then one entry per parameter, if there are such; on
            the training device until read.
    """

    values: Tensor

    def __repr__(self) -> str:
        """Write the number of entries: they may still be on their device."""
        return f"StepQuantity({len(self.values)} values)"

    def __str__(self) -> str:
        """Write the total."""
        return str(self.estimate)

    @property
    def value(self) -> float:
        """Of all parameters together."""
        return float(self.values[0])

    @property
    def estimate(self) -> Estimate:
        """The same as an estimate; a single step gives no error."""
        return Estimate(self.value)

    @property
    def layers(self) -> tuple[Estimate, ...]:
        """One entry per parameter, in the reading's order; none where it has none."""
        return tuple(Estimate(value) for value in self.values[1:].tolist())

    def columns(self, name: str) -> dict[str, float]:
        """Return its columns of a table."""
        return {name: self.value}


@dataclass(frozen=True, slots=True)
class HessianForms:
    """Curvature along the gradients of chunks, from which the noise scale follows.

    Attributes:
        values: ``c_k' H c_l``, with ``H`` of other examples ``(K, K)``.
        chunk_size: Examples behind each ``c_k``.
    """

    values: Tensor = field(repr=False)
    chunk_size: int

    def __str__(self) -> str:
        """Write the noise scale of this step."""
        return str(self.estimate)

    @property
    def noise(self) -> HessianNoiseScale:
        """The noise scale and its parts; errors are conditional on the Hessian."""
        return hessian_noise_scale(self.values, chunk_size=self.chunk_size)

    @property
    def estimate(self) -> Estimate:
        """``tr(HΣ) / G'HG`` of this step alone [examples]."""
        return self.noise.hessian_noise_scale

    def columns(self, name: str) -> dict[str, float]:
        """Return its columns of a table; the parts can be averaged over steps."""
        noise = self.noise
        return {
            name: noise.hessian_noise_scale.value,
            "noise_curvature": noise.noise_curvature.value,
            "gradient_curvature": noise.gradient_curvature.value,
        }
