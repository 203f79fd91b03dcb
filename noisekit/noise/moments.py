"""Sufficient statistics of per-example gradients, and what follows from them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource
from noisekit.noise.scale import NoiseParts, NoiseScale


@dataclass(frozen=True, slots=True)
class GradientMoments:
    r"""What one optimiser step tells about gradient noise, mergeable and summable.

    With ``u_i`` the contribution of unit ``i`` to the mean gradient and ``w_i`` its
    weight in it, ``sum w_i = 1``: ``u_i = w_i g_i``. Statistics may be scalars or hold
    one entry per layer; they stay on their device until they are asked for.

    Attributes:
        num_units: Units ``n``: examples, or ghost batches.
        unit_size: Examples behind one unit.
        weight_sq_sum: ``sum w_i²``; ``1/n`` where all weigh the same.
        sum_sq_norm: ``sum |u_i|²`` [loss²/param²].
        sum_fourth: ``sum |u_i|⁴`` [loss⁴/param⁴].
        grad_sq_norm: ``|sum u_i|²``, of the reduced gradient [loss²/param²].
    """

    num_units: int
    unit_size: int
    weight_sq_sum: float
    sum_sq_norm: Tensor
    sum_fourth: Tensor
    grad_sq_norm: Tensor

    @property
    def num_effective(self) -> float:
        """Units of equal weight that average noise as much, ``1 / sum w_i²``."""
        return 1.0 / self.weight_sq_sum

    @property
    def mean_sq_norm(self) -> Tensor:
        """Mean of ``|g_i|²`` over the units [loss²/param²]."""
        return self.num_effective * self.sum_sq_norm

    @property
    def mean_fourth(self) -> Tensor:
        """Mean of ``|g_i|⁴`` over the units [loss⁴/param⁴]."""
        return self.num_effective**3 * self.sum_fourth

    def merge(
        self, other: "GradientMoments", *, grad_sq_norm: Tensor
    ) -> "GradientMoments":
        """Return the moments of both chunks' units together, as one mean.

        A squared norm of a sum does not follow from those of its parts, so that it
        has to be given: take it from the reduced gradient. Every unit then weighs by
        its share, as if both chunks had been one batch.

        Raises:
            UsageError: If the chunks' units are of different sizes.
        """
        if self.unit_size != other.unit_size:
            raise UsageError(
                "merging moments needs units of one size, got "
                f"{self.unit_size} and {other.unit_size} examples."
            )
        total = self.num_units + other.num_units
        a, b = self.num_units / total, other.num_units / total
        return replace(
            self,
            num_units=total,
            weight_sq_sum=a**2 * self.weight_sq_sum + b**2 * other.weight_sq_sum,
            sum_sq_norm=a**2 * self.sum_sq_norm + b**2 * other.sum_sq_norm,
            sum_fourth=a**4 * self.sum_fourth + b**4 * other.sum_fourth,
            grad_sq_norm=grad_sq_norm,
        )

    def layer(self, index: int) -> "GradientMoments":
        """Return the scalar moments of one entry."""
        return replace(
            self,
            sum_sq_norm=self.sum_sq_norm[index],
            sum_fourth=self.sum_fourth[index],
            grad_sq_norm=self.grad_sq_norm[index],
        )

    def parts(self, *, population_size: int | None = None) -> NoiseParts | None:
        r"""Return ``tr Σ`` and ``|G|²``, both unbiased; ``None`` of fewer than 2 units.

        .. math:: \widehat{\mathrm{tr}\,\Sigma} = \frac{S_1 - q}{1 - 1/n}, \quad
                  \hat G^2 = q - \frac{f}{n} \widehat{\mathrm{tr}\,\Sigma}, \quad
                  S_1 = n \sum_i |u_i|^2, \; q = |\sum_i u_i|^2

        with the effective ``n`` and ``f = 1``. Given ``population_size``, the units
        are a sample without replacement of a finite data set and ``|G|²`` is of that
        set's own mean gradient: ``f = 1 - n / N``.

        The errors are bounds, since norms alone do not tell how the noise is spread
        over directions: that of ``|G|²`` is attained if all noise lies along ``G``.
        Averages over steps (``ratio_of_averages``) and frozen weights
        (``per_example_noise_scale``) have sharper ones.

        Source:
            McCandlish et al. 2018, arXiv:1812.06162, appendix A.1; Cochran 1977,
            section 2.6, for the finite population.
        """
        if self.num_units < 2:
            return None
        n = self.num_effective
        statistics = (self.mean_sq_norm, self.mean_fourth, self.grad_sq_norm)
        mean_sq, mean_fourth, q = torch.stack(statistics).double().tolist()
        trace = (mean_sq - q) / (1 - 1 / n)
        left = 1.0
        if population_size is not None:
            left = max(0.0, 1 - n * self.unit_size / population_size)
        norm = q - left * trace / n
        spread = max(0.0, mean_fourth - mean_sq**2) / (n - 1)
        along = 4 * max(norm, 0.0) * trace / n + 2 * trace**2 / (n * (n - 1))
        trace_variance = spread * (n / (n - 1)) ** 2 * self.unit_size**2
        norm_variance = max(0.0, along) * left
        return NoiseParts(
            trace * self.unit_size,
            norm,
            trace_variance,
            norm_variance,
            -math.sqrt(trace_variance * norm_variance),  # the widest ratio
            ErrorSource.DATA,
            self.num_units,
        )

    def finalise(self, *, population_size: int | None = None) -> NoiseScale | None:
        """Return the noise scale of this step alone; see ``parts``."""
        parts = self.parts(population_size=population_size)
        return None if parts is None else parts.noise_scale()
