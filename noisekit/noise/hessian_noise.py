"""The noise scale that counts curvature: ``tr(HΣ) / G'HG``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.core.results import ErrorSource, Estimate, Ratio, Status


@dataclass(frozen=True, slots=True)
class HessianNoiseScale:
    """The Hessian-weighted noise scale and its parts.

    Attributes:
        hessian_noise_scale: ``tr(HΣ) / G'HG`` [examples]; where ``H`` is indefinite
            the denominator may not be positive, and there is then no such scale.
        noise_curvature: ``tr(HΣ)``, unbiased [loss³/param⁴].
        gradient_curvature: ``G'HG``, unbiased [loss³/param⁴].
    """

    hessian_noise_scale: Estimate
    noise_curvature: Estimate
    gradient_curvature: Estimate


def hessian_noise_scale(forms: Tensor, *, chunk_size: int) -> HessianNoiseScale:
    r"""Return the Hessian noise scale from curvatures along chunk gradients.

    With gradients ``c_k`` of ``K`` independent chunks of ``b`` examples and
    ``A_kl = c_k' H c_l``:

    .. math:: \widehat{G'HG} = \frac{\sum_{k \ne l} A_{kl}}{K (K - 1)}, \quad
              \widehat{\mathrm{tr}(H\Sigma)} = b \Big(\frac{\sum_k A_{kk}}{K} -
              \widehat{G'HG}\Big)

    Both are unbiased if ``H`` does not depend on the chunks: take it of other data.
    Errors are those of the jackknife over chunks.

    Args:
        forms: ``A``, ``(K, K)`` [loss³/param⁴].
        chunk_size: Examples ``b`` behind each chunk gradient.

    Raises:
        BatchSizeError: If there are fewer than 3 chunks, or none in a chunk.
        UsageError: If ``forms`` is not square.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, section 2.2.
    """
    if forms.ndim != 2 or forms.shape[0] != forms.shape[1]:
        raise UsageError(
            "a Hessian noise scale needs c_k' H c_l of every pair of chunks, got a "
            f"tensor of shape {tuple(forms.shape)}."
        )
    _check(len(forms), chunk_size)
    matrix = forms.double()
    matrix = (matrix + matrix.T) / 2
    return hessian_noise_of_sums(
        matrix.sum(1), matrix.diagonal(), chunk_size=chunk_size
    )


def hessian_noise_of_sums(
    row_sums: Tensor, diagonal: Tensor, *, chunk_size: int
) -> HessianNoiseScale:
    """Return the same from what it needs of a large ``A``.

    Args:
        row_sums: ``c_k' H sum_l c_l`` of every chunk ``(K,)`` [loss³/param⁴].
        diagonal: ``c_k' H c_k`` ``(K,)`` [loss³/param⁴].
        chunk_size: Examples behind each chunk gradient.

    Raises:
        BatchSizeError: If there are fewer than 3 chunks, or none in a chunk.
    """
    count = len(diagonal)
    _check(count, chunk_size)
    rows, diagonal = row_sums.double(), diagonal.double()
    total = rows.sum()
    noise, signal = _parts(total, diagonal.sum(), count, chunk_size)
    # Leaving chunk k out removes its row and its column, which share A_kk; all K
    # leave-one-out statistics at once, (K,).
    left = total - 2 * rows + diagonal
    spread = torch.cov(
        torch.stack(_parts(left, diagonal.sum() - diagonal, count - 1, chunk_size)),
        correction=0,
    ) * (count - 1)
    return _assembled(float(noise), float(signal), spread, count)


def _check(count: int, chunk_size: int) -> None:
    if count < 3 or chunk_size < 1:
        raise BatchSizeError(
            "the error of a Hessian noise scale needs 3 chunks of 1 or more examples, "
            f"got {count} of {chunk_size}."
        )


def _parts(
    total: Tensor, trace: Tensor, count: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    # Pairs of different chunks are independent: E c_k' H c_l = G' H G. On the diagonal
    # E c_k' H c_k = G' H G + tr(H Sigma) / b.
    signal = (total - trace) / (count * (count - 1))
    return chunk_size * (trace / count - signal), signal


def _assembled(
    noise: float, signal: float, spread: Tensor, count: int
) -> HessianNoiseScale:
    ratio = Ratio(
        noise,
        signal,
        float(spread[0, 0]),
        float(spread[1, 1]),
        float(spread[0, 1]),
        signed=True,
    )

    def estimate(
        value: float,
        *,
        stderr: float | None = None,
        of: Ratio | None = None,
        status: Status = Status.OK,
    ) -> Estimate:
        return Estimate(
            value,
            stderr,
            error_source=ErrorSource.DATA,
            num_samples=count,
            dof=count - 1,
            ratio=of,
            status=status,
        )

    status, value = Status.NO_SIGNAL, float("nan")
    if signal > 0:
        value = noise / signal
        bounded = estimate(value, of=ratio).interval().bounded
        status = Status.OK if bounded else Status.NOT_RESOLVED
    return HessianNoiseScale(
        estimate(value, of=ratio, status=status),
        estimate(noise, stderr=float(spread[0, 0]) ** 0.5),
        estimate(signal, stderr=float(spread[1, 1]) ** 0.5),
    )
