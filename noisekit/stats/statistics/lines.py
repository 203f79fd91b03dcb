"""Straight lines by least squares, for slopes and exponents."""

import math

import numpy as np
from numpy.typing import ArrayLike


def slope_of(x: ArrayLike, y: ArrayLike) -> float:
    """Return the least-squares slope of y on x; NaN for under 2 points or a gap.

    Example:
        >>> slope_of([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
        2.0
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centred = first - first.mean() if first.size else first
    square = float(np.sum(centred**2))
    if first.size < 2 or square <= 0.0:
        return math.nan
    return float(np.sum(centred * second)) / square
