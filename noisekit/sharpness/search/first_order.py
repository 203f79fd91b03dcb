"""How much of a rise the gradient alone accounts for, and what a reader must know."""

import math

from noisekit.core.results import Status

_MINIMISER_SHARE = 0.01
"""First-order share above which the point is called an iterate, not a minimiser."""


def first_order_share(linear: float, rise: float) -> float:
    """Return the part of a rise that a linear loss would give, at most 1.

    NaN where the loss did not rise.
    """
    return min(1.0, linear / rise) if rise > 0 else math.nan


def reading(
    loss: float, rise: float, region: str, *, share: float = math.nan
) -> tuple[Status, str]:
    """Return whether a rise can be relied on, and what a reader must know.

    Args:
        loss: Loss at the point itself.
        rise: The largest rise found around it.
        region: Where that was sought, such as ``"box"``.
        share: The first-order share; NaN where it says nothing.
    """
    if not math.isfinite(loss):
        return Status.DIVERGED, f"the loss at the point itself is {loss}"
    if not math.isfinite(rise):
        return Status.NOT_RESOLVED, f"the loss is not finite at a point of the {region}"
    if share > _MINIMISER_SHARE:
        return Status.OK, (
            "iterate, not a minimiser: the gradient alone gives "
            f"{100 * share:.0f} % of the rise"
        )
    return Status.OK, ""


def remarks(*parts: str | None) -> str:
    """Join what there is to say about a result into one line."""
    return "; ".join(part for part in parts if part)
