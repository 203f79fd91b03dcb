"""The simple noise scale: two unbiased parts and their ratio, with intervals.

Every estimator here gives the two parts, ``tr Σ`` and ``|G|²``, each unbiased. Their
ratio is not: parts are averaged first and divided last, and a negative ``|G|²`` is
kept, since dropping it would bias the average.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.core.results import ErrorSource, Estimate, Ratio, Status

# Of a jackknife over steps. 19 degrees of freedom cost little (t = 2.09 against 1.96),
# and blocks are best long, since correlation within them does no harm.
DEFAULT_BLOCKS = 20


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """The simple noise scale and its parts.

    Attributes:
        simple_noise_scale: ``tr Σ / |G|²`` [examples].
        variance_trace: ``tr Σ``, per example, ``n - 1`` denominator [loss²/param²].
        debiased_grad_sq_norm: ``|G|²``, unbiased; may be negative [loss²/param²].
    """

    simple_noise_scale: Estimate
    variance_trace: Estimate
    debiased_grad_sq_norm: Estimate


@dataclass(frozen=True, slots=True)
class NoiseParts:
    """``tr Σ`` and ``|G|²`` with their sampling covariance, before dividing.

    Attributes:
        variance_trace: ``tr Σ`` [loss²/param²].
        debiased_grad_sq_norm: ``|G|²`` [loss²/param²].
        trace_variance: Sampling variance of the first.
        norm_variance: Sampling variance of the second.
        covariance: Sampling covariance of the two.
        error_source: What the error would average over.
        num_samples: How many of those there were.
        dof: Degrees of freedom of the variances; ``None`` means a normal quantile.
    """

    variance_trace: float
    debiased_grad_sq_norm: float
    trace_variance: float
    norm_variance: float
    covariance: float
    error_source: ErrorSource
    num_samples: int
    dof: float | None = None

    @property
    def finite(self) -> bool:
        """Whether both parts are finite numbers."""
        return math.isfinite(self.variance_trace + self.debiased_grad_sq_norm)

    def noise_scale(self, *, counted: float = 1.0) -> NoiseScale:
        """Return both parts and their ratio, with Fieller's confidence set.

        Args:
            counted: Weight of an example in the ratio, such as the tokens of a
                sequence; the parts remain those of examples.

        Where ``|G|²`` is not positive the ratio is NaN with ``Status.NO_SIGNAL``;
        where the set is unbounded, ``Status.NOT_RESOLVED``. The set exists in both
        cases, and prints as "more than".
        """
        signal = self.debiased_grad_sq_norm > 0
        value = math.nan
        status = Status.NO_SIGNAL
        ratio = self if counted == 1.0 else self.scaled(counted)
        if signal:
            value = ratio.variance_trace / self.debiased_grad_sq_norm
            bounded = ratio._ratio_estimate(value, Status.OK).interval().bounded
            status = Status.OK if bounded else Status.NOT_RESOLVED
        return NoiseScale(
            ratio._ratio_estimate(value, status),
            self._part(self.variance_trace, self.trace_variance),
            self._part(self.debiased_grad_sq_norm, self.norm_variance),
        )

    def scaled(self, factor: float) -> "NoiseParts":
        """Return the parts with ``tr Σ`` times ``factor``, errors included."""
        return replace(
            self,
            variance_trace=self.variance_trace * factor,
            trace_variance=self.trace_variance * factor**2,
            covariance=self.covariance * factor,
        )

    def _part(self, value: float, variance: float) -> Estimate:
        return Estimate(
            value,
            math.sqrt(max(0.0, variance)),
            error_source=self.error_source,
            num_samples=self.num_samples,
            dof=self.dof,
        )

    def _ratio_estimate(self, value: float, status: Status) -> Estimate:
        return Estimate(
            value,
            error_source=self.error_source,
            num_samples=self.num_samples,
            dof=self.dof,
            status=status,
            ratio=Ratio(
                self.variance_trace,
                self.debiased_grad_sq_norm,
                self.trace_variance,
                self.norm_variance,
                self.covariance,
            ),
        )


def two_batch_noise_scale(
    small_sq_norm: Tensor,
    big_sq_norm: Tensor,
    *,
    small_batch: int,
    big_batch: int,
    num_blocks: int = DEFAULT_BLOCKS,
) -> NoiseScale:
    r"""Estimate the simple noise scale from gradients at two batch sizes.

    Both parts are unbiased; their ratio is not. Parts are averaged over steps before
    dividing, never the ratios. A small batch may be a part of the big one.

    .. math:: \hat G^2 = \frac{B|g_B|^2 - b|g_b|^2}{B - b}, \quad
              \hat S = \frac{|g_b|^2 - |g_B|^2}{1/b - 1/B}

    Args:
        small_sq_norm: ``|g_b|²`` per step, of a mean loss [loss²/param²].
        big_sq_norm: ``|g_B|²`` at the same steps [loss²/param²].
        small_batch: Examples ``b`` behind each ``g_b``.
        big_batch: Examples ``B`` behind each ``g_B``.
        num_blocks: Blocks of the jackknife over steps.

    Returns:
        ``Ŝ/Ĝ²`` [examples] and both parts.

    Raises:
        BatchSizeError: If ``small_batch`` is not in ``[1, big_batch)``.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.

    Example:
        >>> small, big = torch.tensor([5.0, 5.0]), torch.tensor([3.0, 3.0])
        >>> est = two_batch_noise_scale(small, big, small_batch=8, big_batch=32)
        >>> round(est.simple_noise_scale.value, 3)
        9.143
    """
    if not 1 <= small_batch < big_batch:
        raise BatchSizeError(
            "a two-batch noise scale needs 1 <= small_batch < big_batch, got "
            f"small_batch={small_batch}, big_batch={big_batch}."
        )
    # E |g_B|^2 = |G|^2 + tr Sigma / B at both sizes: two linear equations per step. In
    # double precision, since they subtract nearly equal norms where noise is small.
    small, big = small_sq_norm.double(), big_sq_norm.double()
    norms = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    traces = (small - big) / (1 / small_batch - 1 / big_batch)
    return ratio_of_averages(traces, norms, num_blocks=num_blocks)


def per_example_noise_scale(
    sq_norms: Tensor, inner_products: Tensor, *, counted: float = 1.0
) -> NoiseScale:
    r"""Estimate the simple noise scale from single examples' gradients.

    .. math:: \hat S = \frac{n (S_1 - q)}{n - 1}, \quad
              \hat G^2 = \frac{n q - S_1}{n - 1}, \quad
              S_1 = \tfrac1n \sum_i |g_i|^2, \; q = |\bar g|^2

    The errors are those of the jackknife over examples, in closed form.

    Args:
        sq_norms: ``|g_i|²`` of each example's own gradient [loss²/param²].
        inner_products: ``<g_i, ḡ>`` with the mean gradient [loss²/param²].
        counted: Weight of an example in the scale, such as a sequence's tokens.

    Raises:
        BatchSizeError: If there are fewer than 3 examples.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, at a small batch of 1;
        Efron and Stein 1981 for the jackknife.

    Example:
        >>> g = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, -2.0], [1.0, 0.0]])
        >>> est = per_example_noise_scale(g.square().sum(1), g @ g.mean(0))
        >>> round(est.variance_trace.value, 4), round(est.simple_noise_scale.value, 4)
        (2.6667, 8.0)
    """
    n = len(sq_norms)
    if n < 3:
        raise BatchSizeError(
            f"the error of a per-example noise scale needs 3 examples, got {n}."
        )
    s, h = sq_norms.double(), inner_products.double()
    mean_sq, sq_mean = s.mean(), h.mean()
    # All n leave-one-out statistics at once: without example i the mean of |g|^2 is
    # (n S_1 - s_i) / (n - 1), and the mean gradient (n mean - g_i) / (n - 1), whose
    # squared norm expands into |mean|^2, h_i and s_i.
    left_sq = (n * mean_sq - s) / (n - 1)  # (n,)
    left_mean = (n * n * sq_mean - 2 * n * h + s) / (n - 1) ** 2  # (n,)
    traces = (n - 1) * (left_sq - left_mean) / (n - 2)
    norms = ((n - 1) * left_mean - left_sq) / (n - 2)
    # Jackknife covariance (n - 1)/n sum (x_(i) - mean)(y_(i) - mean).
    spread = torch.cov(torch.stack([traces, norms]), correction=0) * (n - 1)
    return NoiseParts(
        float(n * (mean_sq - sq_mean) / (n - 1)),
        float((n * sq_mean - mean_sq) / (n - 1)),
        float(spread[0, 0]),
        float(spread[1, 1]),
        float(spread[0, 1]),
        ErrorSource.DATA,
        n,
    ).noise_scale(counted=counted)


def ratio_of_averages(
    variance_traces: Tensor,
    grad_sq_norms: Tensor,
    *,
    weights: Tensor | None = None,
    num_blocks: int = DEFAULT_BLOCKS,
) -> NoiseScale:
    """Average both parts over steps, then divide; errors by a block jackknife.

    Blocks are consecutive steps, so that correlation between neighbours counts; the
    interval assumes that blocks are independent of each other.

    Args:
        variance_traces: Unbiased ``tr Σ`` per step [loss²/param²].
        grad_sq_norms: Unbiased ``|G|²`` at the same steps; negative ones belong
            [loss²/param²].
        weights: Weight per step, such as its number of examples.
        num_blocks: At most how many blocks; no more than there are steps.

    Raises:
        UsageError: If there are fewer than 2 steps, or the lengths differ.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1; Künsch 1989 for
        the block jackknife.

    Example:
        >>> traces = torch.tensor([8.0, 12.0, 10.0, 10.0])
        >>> norms = torch.tensor([1.1, 0.9, 1.0, 1.0])
        >>> print(ratio_of_averages(traces, norms).simple_noise_scale)
        10 [6.55, 14.48]
    """
    steps = len(variance_traces)
    if steps < 2 or len(grad_sq_norms) != steps:
        raise UsageError(
            "a ratio of averages needs both parts at the same 2 or more steps, got "
            f"{steps} and {len(grad_sq_norms)}; take more readings."
        )
    parts = torch.stack([variance_traces.double(), grad_sq_norms.double()])
    weight = torch.ones(steps) if weights is None else weights
    weight = weight.to(parts)
    # Block of each step; sizes differ by one step at most.
    blocks = torch.arange(steps, device=parts.device) * min(num_blocks, steps) // steps
    count = int(blocks[-1]) + 1
    sums = parts.new_zeros(2, count).index_add_(1, blocks, parts * weight)
    totals = parts.new_zeros(count).index_add_(0, blocks, weight)
    mean = sums.sum(1) / totals.sum()  # (2,)
    # Delete-one-block jackknife: averages without each block, (2, count).
    left_out = (sums.sum(1, keepdim=True) - sums) / (totals.sum() - totals)
    spread = torch.cov(left_out, correction=0) * (count - 1)  # (2, 2)
    return NoiseParts(
        float(mean[0]),
        float(mean[1]),
        float(spread[0, 0]),
        float(spread[1, 1]),
        float(spread[0, 1]),
        ErrorSource.STEPS,
        steps,
        dof=count - 1,
    ).noise_scale()
