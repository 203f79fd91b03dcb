"""How narrow an interval a number of pairs gives, before any run."""

import math

from scipy.special import stdtrit

from noisekit.core.errors import UsageError

_MOST_PAIRS = 100_000


def half_width(deviation: float, num_pairs: int, *, level: float = 0.95) -> float:
    r"""Return the half width of Student's t-interval of a mean over pairs.

    .. math:: t_{n-1,\,(1+\text{level})/2} \; s / \sqrt{n}

    Args:
        deviation: Standard deviation ``s`` of the paired differences, or log ratios.
        num_pairs: Number ``n`` of pairs.
        level: Level of the interval.

    Returns:
        The half width, in the unit of ``deviation``; infinite for fewer than two
        pairs.

    Raises:
        UsageError: If ``deviation`` is no positive number, or ``level`` no
            probability.

    Example:
        >>> round(half_width(0.0035, 5), 5)
        0.00435
    """
    if not (math.isfinite(deviation) and deviation > 0 and 0 < level < 1):
        raise UsageError(
            "half_width needs a positive standard deviation and a level between 0 and "
            f"1, got {deviation} and {level}."
        )
    if num_pairs < 2:
        return math.inf
    quantile = float(stdtrit(num_pairs - 1, (1 + level) / 2))
    return quantile * deviation / math.sqrt(num_pairs)


def pairs_needed(deviation: float, width: float, *, level: float = 0.95) -> int | None:
    """Return the fewest pairs whose interval has at most a half width.

    Args:
        deviation: Standard deviation of the paired differences, or log ratios.
        width: The half width wanted, in the same unit.
        level: Level of the interval.

    Returns:
        The number, at least 2; ``None`` where it is above 100,000.

    Example:
        >>> pairs_needed(0.0035, 0.0025)
        11
    """
    low, high = 1, 2
    while half_width(deviation, high, level=level) > width:
        low, high = high, 2 * high
        if high > _MOST_PAIRS:
            return None
    while high - low > 1:  # falls with the number of pairs
        middle = (low + high) // 2
        enough = half_width(deviation, middle, level=level) <= width
        low, high = (low, middle) if enough else (middle, high)
    return high
