"""Adjustment of p-values for several tests."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from noisekit.core.errors import UsageError

_P_VALUES = "needs one row of p-values in [0, 1]"


def holm(p_values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p-values adjusted so that rejecting those at most alpha errs alpha often.

    The chance that any true null is rejected is at most alpha, whatever the dependence
    between the tests. The order of the input is kept.

    Raises:
        UsageError: If a value is not in [0, 1].

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not _are_p_values(values):
        raise UsageError(f"Holm's method {_P_VALUES}, got {values.tolist()}.")
    order = np.argsort(values, kind="stable")
    factors = np.arange(values.size, 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return adjusted


def pooled_adjustment(
    beyond: Sequence[float] | NDArray[np.float64],
    inside: Sequence[float] | NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Adjust the two tests of each of ``m`` contrasts as one family of ``2m``.

    Each contrast is tested for an effect beyond its margin and for one inside it. Of
    the two nulls (the effect is inside; it is outside) exactly one is true, so ``m``
    of the ``2m`` are true however many were rejected. Holm's first factor ``2m`` may
    therefore be ``m`` (Shaffer). It then stays there, since rejecting one null of a
    contrast proves the other true and does not take it out of the count. Counting
    down ``m, m - 1, ...`` over contrasts, as for one test each, can err in more than
    alpha: 5.5 % instead of 5 % for two opposed contrasts. In exchange every adjusted
    verdict agrees with a simultaneous interval, at level ``1 - alpha/m``.

    Args:
        beyond: p-value per contrast of the claim that the effect is beyond the margin.
        inside: p-value per contrast of the claim that it is inside.

    Returns:
        Both, adjusted, in the order given.

    Raises:
        UsageError: If the two differ in length or a value is not in [0, 1].

    Source:
        Shaffer 1986, "Modified sequentially rejective multiple test procedures".
    """
    first = np.asarray(beyond, dtype=np.float64)
    second = np.asarray(inside, dtype=np.float64)
    for values in (first, second):
        if not _are_p_values(values):
            raise UsageError(f"pooled adjustment {_P_VALUES}, got {values.tolist()}.")
    if first.size != second.size:
        raise UsageError(
            "pooled adjustment needs one 'beyond' and one 'inside' p-value per "
            f"contrast, got {first.size} and {second.size}."
        )
    num_true = first.size
    return np.minimum(first * num_true, 1.0), np.minimum(second * num_true, 1.0)


def _are_p_values(values: NDArray[np.float64]) -> bool:
    return values.ndim == 1 and bool(np.all((values >= 0.0) & (values <= 1.0)))
