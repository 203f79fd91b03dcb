"""Sufficient statistics of per-example gradients, and what follows from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource
from noisekit.noise.scale import NoiseParts, NoiseScale

_ALONE = 1e-6
"""Rounding error of an effective number of units, relative."""


MOMENT_COLUMNS = (
    "unit_size",
    "weight_sq_sum",
    "mean_sq_norm",
    "mean_fourth",
    "sq_norm_of_mean",
)
"""Columns of a table that hold the statistics, beside the numbers of units."""


@dataclass(frozen=True, slots=True)
class GradientMoments:
    r"""Sufficient statistics of the gradient noise of one optimizer step; mergeable.

    With ``u_i`` the contribution of unit ``i`` to the mean gradient and ``w_i`` its
    weight in it, ``sum w_i = 1``: ``u_i = w_i g_i``. Statistics may be scalars or hold
    one entry per layer; they stay on their device until they are read.

    Attributes:
        num_units: Units ``n``: examples, chunks, micro-batches, ranks.
        unit_size: Examples behind one unit; of unequal units, the size of equal ones
            that would have as much noise: ``sum w_i² / sum (w_i² / b_i)``.
        weight_sq_sum: ``sum w_i²``; ``1/n`` where all weigh the same.
        sum_sq_norm: ``sum |u_i|²`` [loss²/param²].
        sum_fourth: ``sum |u_i|⁴``; NaN where it was not read [loss⁴/param⁴].
        grad_sq_norm: ``|sum u_i|²``, of the reduced gradient [loss²/param²].
        num_read: Units in the sample, where the norms of a random subset were read.

    Example:
        >>> grads = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, -2.0], [1.0, 0.0]])
        >>> u = grads / 4  # contributions to the mean gradient
        >>> norms, total = u.square().sum(1), u.sum(0).square().sum()
        >>> moments = GradientMoments(
        ...     4, 1.0, 1 / 4, norms.sum(), norms.square().sum(), total
        ... )
        >>> trace, norm = moments.trace_and_norm()
        >>> round(float(trace), 4), round(float(norm), 4)
        (2.6667, 0.3333)
    """

    num_units: int
    unit_size: float | Tensor
    weight_sq_sum: float | Tensor
    sum_sq_norm: Tensor = field(repr=False)
    sum_fourth: Tensor = field(repr=False)
    grad_sq_norm: Tensor = field(repr=False)
    num_read: int | None = None

    def __str__(self) -> str:
        """Write the units and, of scalar moments, the noise scale and its parts."""
        units = f"{self.num_units} units of {float(self.unit_size):g} examples"
        if self.grad_sq_norm.ndim:
            return f"gradient moments of {units}, {self.grad_sq_norm.numel()} entries"
        scale = self.finalise()
        if scale is None:
            return f"gradient moments of {units}: too few for a noise scale"
        return (
            f"gradient moments of {units}: noise scale {scale.simple_noise_scale}, "
            f"tr Σ {scale.variance_trace}, |G|² {scale.debiased_grad_sq_norm}"
        )

    @property
    def num_effective(self) -> float | Tensor:
        """Number of equally weighted units with as much noise, ``1 / sum w_i²``."""
        return 1.0 / self.weight_sq_sum

    @property
    def mean_sq_norm(self) -> Tensor:
        """Mean of ``|g_i|²`` over the units [loss²/param²].

        Weighted by ``w_i²``, so that units of different sizes can be pooled: the noise
        of unit ``i``, ``tr Σ / b_i``, enters like that of ``unit_size`` examples.
        """
        # n sum w_i^2 |g_i|^2 with n = 1 / sum w_i^2: weights w_i^2 / sum w^2.
        return self.num_effective * self.sum_sq_norm

    @property
    def mean_fourth(self) -> Tensor:
        """Mean of ``|g_i|⁴`` over the units [loss⁴/param⁴]."""
        # (1/n) sum |g_i|^4 with g_i = n u_i; exact for equal weights.
        return self.num_effective**3 * self.sum_fourth

    def columns(self) -> dict[str, float | int]:
        """Return the statistics as numbers, the inverse of ``from_columns``."""
        return {
            "num_units": self.num_units,
            "num_read": self.num_units if self.num_read is None else self.num_read,
            "unit_size": float(self.unit_size),
            "weight_sq_sum": float(self.weight_sq_sum),
            "mean_sq_norm": float(self.mean_sq_norm),
            "mean_fourth": float(self.mean_fourth),
            "sq_norm_of_mean": float(self.grad_sq_norm),
        }

    @classmethod
    def from_columns(cls, row: Mapping[str, float | int], prefix: str = "") -> Self:
        """Return the moments that a row of a table holds.

        Args:
            row: A row of ``Probe.frame`` or of a run's ``steps`` table.
            prefix: What the columns' names begin with, such as ``"chunks_"``.
        """

        def value(name: str) -> Tensor:
            return torch.tensor(float(row[prefix + name]), dtype=torch.float64)

        weight_sq_sum = float(value("weight_sq_sum"))
        num_units, num_read = (int(value(name)) for name in ("num_units", "num_read"))
        return cls(
            num_units,
            float(value("unit_size")),
            weight_sq_sum,
            value("mean_sq_norm") * weight_sq_sum,
            value("mean_fourth") * weight_sq_sum**3,
            value("sq_norm_of_mean"),
            None if num_read == num_units else num_read,
        )

    def merge(
        self, other: "GradientMoments", *, grad_sq_norm: Tensor
    ) -> "GradientMoments":
        """Return the moments of both chunks' units together, as one mean.

        The squared norm of a sum does not follow from those of its parts, so that it
        has to be given: take it from the reduced gradient. Every unit is weighted by
        its share, as if both chunks had been one batch.

        Raises:
            UsageError: If the chunks' units are of different sizes.
        """
        if float(self.unit_size) != float(other.unit_size):
            raise UsageError(
                "merging moments needs units of one size, got "
                f"{float(self.unit_size):g} and {float(other.unit_size):g} examples."
            )
        total = self.num_units + other.num_units
        # In the joint mean u_i is a (w_i g_i): squares scale by a^2, fourths by a^4.
        a, b = self.num_units / total, other.num_units / total
        return replace(
            self,
            num_units=total,
            weight_sq_sum=a**2 * self.weight_sq_sum + b**2 * other.weight_sq_sum,
            sum_sq_norm=a**2 * self.sum_sq_norm + b**2 * other.sum_sq_norm,
            sum_fourth=a**4 * self.sum_fourth + b**4 * other.sum_fourth,
            grad_sq_norm=grad_sq_norm,
            num_read=None
            if self.num_read is other.num_read is None
            else (self.num_read or self.num_units)
            + (other.num_read or other.num_units),
        )

    def layer(self, index: int) -> "GradientMoments":
        """Return the scalar moments of one entry."""
        return replace(
            self,
            sum_sq_norm=self.sum_sq_norm[index],
            sum_fourth=self.sum_fourth[index],
            grad_sq_norm=self.grad_sq_norm[index],
        )

    def where(self, mask: Tensor) -> "GradientMoments":
        """Return the moments per entry, NaN where ``mask`` is false."""
        return replace(
            self,
            sum_sq_norm=self.sum_sq_norm.where(mask, math.nan),
            sum_fourth=self.sum_fourth.where(mask, math.nan),
            grad_sq_norm=self.grad_sq_norm.where(mask, math.nan),
        )

    def trace_and_norm(
        self, *, population_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``tr Σ`` and ``|G|²`` per entry, on their device; see ``parts``."""
        # With S the covariance trace of one unit: E mean_sq_norm = |G|^2 + S and
        # E |sum u_i|^2 = |G|^2 + S / n, which are solved for S and |G|^2.
        n = self.num_effective
        trace = (self.mean_sq_norm - self.grad_sq_norm) / (1 - 1 / n)
        noise = trace / n
        if population_size is not None:
            # Finite population correction (Cochran 1977, theorem 2.2).
            noise = noise * (1 - n * self.unit_size / population_size)
        # A unit of b examples has S = tr Sigma / b.
        return trace * self.unit_size, self.grad_sq_norm - noise

    def parts(self, *, population_size: int | None = None) -> NoiseParts | None:
        r"""Return ``tr Σ`` and ``|G|²``, both unbiased; ``None`` of fewer than 2 units.

        .. math:: \widehat{\mathrm{tr}\,\Sigma} = \frac{S_1 - q}{1 - 1/n}, \quad
                  \hat G^2 = q - \frac{f}{n} \widehat{\mathrm{tr}\,\Sigma}, \quad
                  S_1 = n \sum_i |u_i|^2, \; q = |\sum_i u_i|^2

        with the effective ``n`` and ``f = 1``. Given ``population_size``, the units
        are a sample without replacement of a finite data set and ``|G|²`` is of that
        set's own mean gradient: ``f = 1 - n / N``.

        The errors are upper bounds, since norms alone do not determine how the noise
        is distributed over directions: that of ``|G|²`` is attained if all noise lies
        along ``G``. Averages over steps (``ratio_of_averages``) and frozen weights
        (``per_example_noise_scale``) have sharper ones. Where fourth powers of the
        norms were not read, one step has no error bound and its intervals are
        unbounded.

        Source:
            McCandlish et al. 2018, arXiv:1812.06162, appendix A.1; Cochran 1977,
            section 2.6, for the finite population.
        """
        n, size = float(self.num_effective), float(self.unit_size)
        if self.num_units < 2 or n < 1 + _ALONE:
            return None
        mean_sq, mean_fourth = float(self.mean_sq_norm), float(self.mean_fourth)
        q = float(self.grad_sq_norm)
        num_read = n * (self.num_read or self.num_units) / self.num_units
        trace = (mean_sq - q) / (1 - 1 / n)
        correction = 1.0  # f above
        if population_size is not None:
            correction = max(0.0, 1 - n * size / population_size)
        norm = q - correction * trace / n
        trace_variance = norm_variance = math.inf
        covariance = 0.0
        if num_read > 1 and not math.isnan(mean_fourth):
            # Var |g_i|^2, as mean square less squared mean.
            spread = max(0.0, mean_fourth - mean_sq**2)
            if n < self.num_units * (1 - _ALONE):
                # Norms of unequal units have different expectations. 2 S^2 is the
                # variance of |e|^2 for Gaussian e along one direction, the largest of
                # all Gaussians with covariance trace S.
                spread = max(spread, 2 * trace**2)
            # Variance of a mean over num_read units, times that of the 1 / (1 - 1/n).
            trace_variance = spread / (num_read - 1) * (n / (n - 1)) ** 2
            # The estimate of |G|^2 is a U-statistic, sum_{i != j} g_i' g_j / n (n - 1),
            # of variance 4 G' S G / n + 2 tr S^2 / (n (n - 1)) with the covariance S
            # (Hoeffding 1948, section 5). Norms do not determine these two terms, but
            # G' S G <= |G|^2 tr S and tr S^2 <= (tr S)^2. The last term is the error of
            # the subtracted trace, where only some units were read.
            along = 4 * max(norm, 0.0) * trace / n + 2 * trace**2 / (n * (n - 1))
            norm_variance = max(0.0, along) * correction + trace_variance / n**2
            # The covariance is unknown; a correlation of -1 gives the widest ratio.
            covariance = -math.sqrt(trace_variance * norm_variance)
        return NoiseParts(
            trace * size,
            norm,
            trace_variance * size**2,
            norm_variance,
            covariance * size,
            ErrorSource.DATA,
            self.num_units,
            dof=max(1.0, num_read - 1),
        )

    def finalise(self, *, population_size: int | None = None) -> NoiseScale | None:
        """Return the noise scale of this step alone; see ``parts``."""
        parts = self.parts(population_size=population_size)
        return None if parts is None else parts.noise_scale()
