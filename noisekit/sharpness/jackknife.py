"""Bias and error of an estimate by leaving out each sample in turn; ratios of means."""

import math
from dataclasses import dataclass

from torch import Tensor

from noisekit.core.results import ErrorSource, Estimate, LogRatio, Status


@dataclass(frozen=True, slots=True)
class Jackknife:
    """Bias-corrected estimate and error from leaving out each sample in turn.

    Attributes:
        centre: The estimate minus its bias.
        stderr: Its standard error.
        dof: Effective degrees of freedom of the error.
    """

    centre: float
    stderr: float
    dof: float


def jackknife(whole: float, left_out: Tensor) -> Jackknife:
    """Return the bias-corrected estimate, its error and effective degrees of freedom.

    The degrees of freedom match the variance of the variance estimate, which for
    gaps of kurtosis ``k`` is ``(k - 1) / n`` of its square; at most ``n - 1``.

    Args:
        whole: The estimate from all ``n`` samples.
        left_out: ``(n,)``, those from all but one.

    Source:
        Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 11.
    """
    count = len(left_out)
    gaps = left_out - left_out.mean()  # (n,)
    square = float(gaps.square().sum())
    fourth = float(gaps.pow(4).sum())
    # A mean of n squares of kurtosis k has the relative variance (k - 1) / n, a chi
    # square of nu degrees of freedom 2 / nu: nu = 2 n / (k - 1), k = n sum g^4 / (sum
    # g^2)^2.
    excess = count * fourth / square**2 - 1 if square > 0 else 0.0
    dof = min(count - 1.0, 2 * count / excess) if excess > 0 else count - 1.0
    # Bias (n - 1) (mean of theta_(i) - theta); variance (n - 1)/n sum of squared gaps.
    return Jackknife(
        centre=count * whole - (count - 1) * float(left_out.mean()),
        stderr=math.sqrt((count - 1) / count * square),
        dof=max(1.0, dof),
    )


def mean_of_ratios(ratios: Tensor) -> Estimate:
    """Return the mean of the batches' own ratios, with its error over batches."""
    count = len(ratios)
    value = float(ratios.mean())
    if not math.isfinite(value):
        return Estimate(math.nan, status=Status.NO_SIGNAL, num_grads=3 * count)
    return Estimate(
        value,
        stderr=float(ratios.std()) / math.sqrt(count) if count > 1 else None,
        error_source=ErrorSource.DATA if count > 1 else None,
        num_samples=count,
        dof=count - 1 if count > 1 else None,
        num_grads=3 * count,
    )


def ratio_of_means(above: Tensor, below: Tensor) -> Estimate:
    """Return the ratio of the batches' means, with its error by the jackknife.

    The curvature of a batch grows faster than its squared gradient, so a few batches
    carry most of both means. On the log scale the estimate is less skewed, and its
    degrees of freedom are as many as its parts' kurtosis leaves. Where a part is not
    positive the interval is symmetric about the ratio.
    """
    count = len(above)
    value = float(above.sum() / below.sum())
    if count < 2 or not math.isfinite(value):
        status = Status.OK if math.isfinite(value) else Status.NO_SIGNAL
        return Estimate(value, status=status, num_grads=3 * count)
    left_out = (above.sum() - above) / (below.sum() - below)  # (n,), without each batch
    positive = value > 0 and bool((left_out > 0).all())
    logs = jackknife(math.log(value), left_out.log()) if positive else None
    plain = jackknife(value, left_out)
    return Estimate(
        value,
        stderr=plain.stderr,
        error_source=ErrorSource.DATA,
        num_samples=count,
        dof=plain.dof if logs is None else logs.dof,
        num_grads=3 * count,
        ratio=None if logs is None else LogRatio(logs.centre, logs.stderr),
    )
