"""Bias and error of an estimate by leaving out each sample in turn."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Jackknife:
    """What leaving out each sample in turn tells of an estimate.

    Attributes:
        centre: The estimate less its bias.
        stderr: Its standard error.
        dof: Degrees of freedom that this error is worth.
    """

    centre: float
    stderr: float
    dof: float


def jackknife(whole: float, left_out: Tensor) -> Jackknife:
    """Return the estimate less its bias, its error, and what that error is worth.

    The degrees of freedom match the variance of the variance estimate, which for
    gaps of kurtosis ``k`` is ``(k - 1) / n`` of its square; at most ``n - 1``.

    Args:
        whole: The estimate from all ``n`` samples.
        left_out: ``(n,)``, those from all but one.

    Source:
        Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 11.
    """
    count = len(left_out)
    gaps = left_out - left_out.mean()
    square = float(gaps.square().sum())
    fourth = float(gaps.pow(4).sum())
    excess = count * fourth / square**2 - 1 if square > 0 else 0.0
    dof = min(count - 1.0, 2 * count / excess) if excess > 0 else count - 1.0
    return Jackknife(
        centre=count * whole - (count - 1) * float(left_out.mean()),
        stderr=math.sqrt((count - 1) / count * square),
        dof=max(1.0, dof),
    )
