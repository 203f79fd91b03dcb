"""Results of measurements: a value with its error, cost and status."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from scipy.special import ndtri, stdtrit

from noisekit.core.arguments import checked
from noisekit.core.settings import Fraction

_LARGEST_LOG = 300.0
"""Half-width of an interval of logs beyond which nothing is known of the ratio."""


class Status(StrEnum):
    """How far a value can be relied on."""

    OK = "ok"
    NOT_RESOLVED = "not_resolved"
    """Noise hides the value; its confidence set is unbounded or spans zero."""
    NO_SIGNAL = "no_signal"
    """The denominator's estimate is not positive; kept, since dropping it biases."""
    NOT_CONVERGED = "not_converged"
    """A solver stopped at its budget; ``bound`` is its error bound."""
    NOT_COMPARABLE = "not_comparable"
    """A fair-test rule is broken."""
    DIVERGED = "diverged"
    """The training that should give the value blew up."""
    UNAVAILABLE = "unavailable"
    """The quantity does not exist here, such as per-example norms under BatchNorm."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Placeholder of a value that does not exist here.

    Attributes:
        reason: Why.
        way_out: What to do instead, where the reason does not say.
    """

    reason: str
    way_out: str = ""

    def __str__(self) -> str:
        """Write the reason and the way out."""
        return f"{self.reason}; {self.way_out}" if self.way_out else self.reason


class ErrorSource(StrEnum):
    """Where the error of an estimate comes from."""

    DATA = "data"
    PROBES = "probes"
    STEPS = "steps"
    SEEDS = "seeds"
    SOLVER = "solver"
    DATA_AND_PROBES = "data and probes"


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence set ``[low, high]``; either end may be infinite."""

    low: float
    high: float
    level: float

    @property
    def bounded(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def contains(self, value: float) -> bool:
        """Whether ``value`` lies inside, ends included."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """Write as ``[low, high]``, or ``more than low`` where unbounded."""
        if self.bounded:
            return f"[{self.low:.4g}, {self.high:.4g}]"
        if math.isfinite(self.low):
            return f"more than {self.low:.4g}"
        if math.isfinite(self.high):
            return f"less than {self.high:.4g}"
        return "unbounded"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Numerator and denominator of a ratio of averages, with their covariance.

    Their joint error gives Fieller's confidence set, which is unbounded where the
    denominator is not resolved from zero.

    Attributes:
        numerator: Average above the line.
        denominator: Average below it.
        numerator_variance: Sampling variance of the first.
        denominator_variance: Sampling variance of the second.
        covariance: Sampling covariance of the two.
        signed: Whether the truth may be negative, as under indefinite curvature.

    Source:
        Fieller 1954, "Some problems in interval estimation".
    """

    numerator: float
    denominator: float
    numerator_variance: float
    denominator_variance: float
    covariance: float
    signed: bool = False

    def confidence_set(self, quantile: float) -> tuple[float, float]:
        """Return the positive part of Fieller's set for a two-sided quantile.

        Of a set that wraps through infinity the positive part is returned:
        ``(low, inf)``. A set that is entirely negative where the truth cannot be, as
        for weights fitted to the same data, is uninformative: ``(0, inf)``.
        """
        if math.isinf(self.numerator_variance + self.denominator_variance):
            return (0.0, math.inf)
        # The theta with (N - theta D)^2 <= t^2 (V_N - 2 theta C + theta^2 V_D), that is
        # a theta^2 - 2 b theta + c <= 0.
        t2 = quantile**2
        a = self.denominator**2 - t2 * self.denominator_variance
        b = self.numerator * self.denominator - t2 * self.covariance
        c = self.numerator**2 - t2 * self.numerator_variance
        discriminant = b * b - a * c
        if discriminant < 0:
            return (0.0, math.inf)
        root = math.sqrt(discriminant)
        if a > 0:
            low, high = (b - root) / a, (b + root) / a
            if self.signed:
                return (low, high)
            return (max(0.0, low), high) if high > 0 else (0.0, math.inf)
        # a <= 0: the denominator is not resolved from zero, and the set is the outside
        # of an interval. Its roots have the product c / a; for c > 0 one of them is
        # positive, and c / (b + root) is that root without cancellation.
        if c <= 0:
            return (0.0, math.inf)
        return (c / (b + root) if b + root > 0 else 0.0, math.inf)


@dataclass(frozen=True, slots=True)
class LogRatio:
    """The log of a ratio of averages and its error: skew falls less on that scale.

    Attributes:
        centre: The log of the ratio, less its bias.
        stderr: Standard error of that.
    """

    centre: float
    stderr: float

    def confidence_set(self, quantile: float) -> tuple[float, float]:
        """Return the interval of the ratio for a two-sided quantile."""
        half = quantile * self.stderr
        if not half < _LARGEST_LOG:
            return (0.0, math.inf)
        return (math.exp(self.centre - half), math.exp(self.centre + half))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value: The point estimate, in the unit that the vocabulary states.
        stderr: Standard error, where the error is statistical.
        bound: A solver's residual bound; never to be printed as plus-minus.
        error_source: What the error would average over.
        num_samples: Examples, probes, steps or seeds behind ``stderr``.
        dof: Degrees of freedom of ``stderr``; ``None`` means a normal quantile.
        status: Whether the value can be relied on.
        num_matvecs: Matrix-vector products spent.
        num_grads: Gradient evaluations spent.
        ratio: The parts, where ``value`` is a ratio of averages.
        side: ``"lower"`` where ``value`` is a lower bound of what is sought, such
            as a maximum found by a search.
        note: What a reader must know, such as why there is no value.
    """

    value: float
    stderr: float | None = None
    bound: float | None = None
    error_source: ErrorSource | None = None
    num_samples: int | None = None
    dof: float | None = None
    status: Status = Status.OK
    num_matvecs: int = 0
    num_grads: int = 0
    ratio: Ratio | LogRatio | None = None
    side: Literal["lower"] | None = None
    note: str | None = None

    def __float__(self) -> float:
        """Return the bare value."""
        return float(self.value)

    @property
    def has_error(self) -> bool:
        """Whether an error is known; else the interval is unbounded."""
        parts = (self.stderr, self.bound, self.ratio, self.side)
        return any(part is not None for part in parts)

    @checked
    def interval(self, level: Fraction = 0.95) -> Interval:
        """Return the confidence set at ``level``.

        A ratio gives its own set; a standard error a t or normal interval; a
        residual bound the enclosure ``value ± bound`` whatever the level; a lower
        bound ``[value, inf)``, less its statistical error where it has one.

        Raises:
            UsageError: If ``level`` is not in (0, 1).
        """
        quantile = _two_sided_quantile(level, self.dof)
        if self.ratio is not None:
            return Interval(*self.ratio.confidence_set(quantile), level)
        half = quantile * (self.stderr or 0.0)
        if self.side == "lower":
            return Interval(self.value - half, math.inf, level)
        if self.stderr is not None:
            return Interval(self.value - half, self.value + half, level)
        if self.bound is not None:
            return Interval(self.value - self.bound, self.value + self.bound, level)
        return Interval(-math.inf, math.inf, level)

    def __repr__(self) -> str:
        """Write what ``str`` does: its parts would flood whatever holds it."""
        return f"Estimate({self})"

    def __str__(self) -> str:
        """Write the value with its kind of error, its status unless OK, its note."""
        if self.ratio is not None:
            text = f"{self.value:.4g} {self.interval()}"
        elif self.stderr is not None:
            text = f"{self.value:.4g} ± {self.stderr:.2g}"
        elif self.bound is not None:
            text = f"{self.value:.4g} (residual {self.bound:.2g})"
        else:
            text = f"{self.value:.4g}"
        text = f"≥ {text}" if self.side == "lower" else text
        if self.status is Status.UNAVAILABLE and self.note is not None:
            return f"{text} [{self.status}: {self.note}]"
        text = text if self.status is Status.OK else f"{text} [{self.status}]"
        return text if self.note is None else f"{text} ({self.note})"


def _two_sided_quantile(level: float, dof: float | None) -> float:
    upper = 0.5 + level / 2
    return float(ndtri(upper) if dof is None else stdtrit(dof, upper))
