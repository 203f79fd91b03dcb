"""Rank correlation with an interval."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import kendalltau

from noisekit.core.errors import UsageError
from noisekit.core.results import Interval, Status


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Kendall's tau-b of two rows.

    Attributes:
        tau: Share of pairs in the same order minus share in opposite order, corrected
            for ties; NaN where one of the rows is constant.
        transformed_stderr: Jackknife standard error of ``atanh(tau)``; NaN where the
            jackknife does not exist, since leaving out a point gives perfect order.
        p_value: Of no association; exact without ties, for few points.
        num_samples: Points.
        status: ``UNAVAILABLE`` where one of the rows is constant.
    """

    tau: float
    transformed_stderr: float
    p_value: float
    num_samples: int
    status: Status = Status.OK

    def interval(self, level: float = 0.95) -> Interval:
        """Return the confidence interval at ``level``; it never leaves [-1, 1].

        From the jackknife on the scale of ``atanh(tau)``, which holds with ties and
        for any joint distribution. Near perfect order, where the jackknife has no
        spread, it is the set of values ``t`` within the quantile of the observed one by
        the largest possible variance ``2(1 - t²)/n``: wide, but never a point.

        Raises:
            UsageError: If ``level`` is not in (0, 1).

        Source:
            The bound: Kendall & Gibbons 1990, "Rank correlation methods", ch. 4.
        """
        if not 0.0 < level < 1.0:
            raise UsageError(f"interval needs a level between 0 and 1, got {level}.")
        if self.status is not Status.OK:
            return Interval(-1.0, 1.0, level)
        quantile = float(ndtri(0.5 + level / 2))
        if math.isnan(self.transformed_stderr):
            return Interval(*self._widest(quantile), level)
        half = quantile * self.transformed_stderr
        centre = math.atanh(self.tau)
        return Interval(math.tanh(centre - half), math.tanh(centre + half), level)

    def _widest(self, quantile: float) -> tuple[float, float]:
        # Roots in t of (tau - t)^2 = quantile^2 * 2 (1 - t^2) / n.
        share = 2.0 * quantile**2 / self.num_samples
        root = math.sqrt(share * (1.0 + share - self.tau**2))
        scale = 1.0 + share
        return (self.tau - root) / scale, (self.tau + root) / scale


def kendall_tau(x: ArrayLike, y: ArrayLike) -> RankCorrelation:
    """Return Kendall's tau-b of two rows with an interval.

    The points must be independent of each other. Runs that share a seed or a
    hyper-parameter are not, and then the interval is too narrow.

    Args:
        x: One value per point.
        y: The same points' other value, in the same order.

    Raises:
        UsageError: If the rows differ in length, have under 4 points or a value that is
            not finite.

    Source:
        Kendall 1945, "The treatment of ties in ranking problems"; Arvesen 1969,
        "Jackknifing U-statistics", for its standard error.
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    fault = _rows_fault(first, second)
    if fault:
        raise UsageError(fault)
    num_samples = int(first.size)
    order_x = np.sign(first[:, None] - first)  # (n, n)
    order_y = np.sign(second[:, None] - second)
    tau = float(_tau_without(order_x, order_y, leave_out=False)[0])
    if math.isnan(tau):
        return RankCorrelation(tau, math.nan, 1.0, num_samples, Status.UNAVAILABLE)
    left_out = _tau_without(order_x, order_y, leave_out=True)
    p_value = float(kendalltau(first, second).pvalue)
    return RankCorrelation(tau, _jackknife(left_out), p_value, num_samples)


def tau_b(x: ArrayLike, y: ArrayLike) -> float:
    """Return Kendall's tau-b alone; NaN where one of the rows is constant.

    Args:
        x: One value per point; finite.
        y: The same points' other value.
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    order_x = np.sign(first[:, None] - first)  # (n, n)
    order_y = np.sign(second[:, None] - second)
    return float(_tau_without(order_x, order_y, leave_out=False)[0])


def _tau_without(
    order_x: NDArray[np.float64], order_y: NDArray[np.float64], *, leave_out: bool
) -> NDArray[np.float64]:
    """Tau-b of all points, or with each point left out once, from shared sums."""
    # Leaving a point out removes its row and its column, which have equal sums.
    parts = [order_x * order_y, order_x**2, order_y**2]
    sums = [part.sum() - 2.0 * leave_out * part.sum(axis=1) for part in parts]
    agreement, untied_x, untied_y = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = agreement / np.sqrt(untied_x * untied_y)
    return np.asarray(np.clip(np.atleast_1d(tau), -1.0, 1.0), dtype=np.float64)


def _jackknife(left_out: NDArray[np.float64]) -> float:
    if not bool(np.all(np.abs(left_out) < 1.0)):
        return math.nan  # also where leaving a point out makes a row constant
    values = np.arctanh(left_out)
    count = values.size
    return math.sqrt((count - 1) * float(np.var(values)))


def _rows_fault(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    if first.ndim != 1 or first.shape != second.shape:
        return (
            "Kendall's tau needs two rows of equal length, got shapes "
            f"{first.shape} and {second.shape}."
        )
    if first.size < 4:
        return f"Kendall's tau needs at least 4 points, got {first.size}."
    missing = int(np.sum(~(np.isfinite(first) & np.isfinite(second))))
    if missing:
        return (
            f"Kendall's tau needs finite values, got {missing} of {first.size} points "
            "with NaN or infinity; decide what they mean before leaving them out."
        )
    return ""
