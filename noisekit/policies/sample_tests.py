"""Policies that grow the batch when a test of its sampling error fails."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from noisekit.core.errors import BatchSizeError
from noisekit.core.settings import Positive, PositiveInt
from noisekit.noise.criteria import (
    NORM_LIMIT,
    SampleTest,
    norm_test_of_variance,
)
from noisekit.policies.adaptive import AtIntervals, Smoothing, Wanted, averaged
from noisekit.policies.policy import Need, Observation, State


@dataclass(frozen=True, kw_only=True)
class NormTest(AtIntervals):
    r"""Grow the batch when the norm test of its gradient fails.

    .. math:: \frac{V}{m} \frac{N - m}{N - 1} \le \theta^2 |g|^2

    Where it fails, the next batch is the smallest that would have passed with the same
    ``V`` and ``|g|²``, rounded up; where it passes, the batch stays. The batch never
    shrinks. The failed update is taken as it is: it is not repeated with the larger
    batch.

    ``|g|²`` of a batch holds ``V / m`` of noise, so that the test always passes with
    ``θ ≥ 1``, and nearly always where noise dominates with ``θ`` close to it.

    Attributes:
        theta: ``θ``.
        population_size: ``N``, examples that batches are drawn from without
            replacement; unlimited by default.
        batch_size: Examples of the first update; ``min`` by default.
        min: Smallest batch size, at least 2.
        max: Largest batch size.
        smoothing: Weight of the past in averages of ``V`` and ``|g|²``; none by
            default, as in the paper.
        every: Interval between tests.
        hysteresis: A change smaller than this share of the present size is not made.

    Source:
        Byrd, Chin, Nocedal and Wu 2012, "Sample size selection in optimization methods
        for machine learning".

    Example:
        >>> import noisekit as nk
        >>> seen = nk.Observation(
        ...     updates=1, batch_size=50, variance_trace=3.0, grad_sq_norm=0.1)
        >>> policy = nk.NormTest(theta=0.5)
        >>> policy.next(policy.start(), seen)[1].batch_size
        120
    """

    name = "norm_test"
    rule = (
        "if V/m (N-m)/(N-1) > theta^2 |g|^2 then m = the smallest batch that passes; "
        "it never shrinks"
    )
    sources = ("byrd2012sample",)
    refuses = (
        "to repeat the failed update with the larger batch, which is another algorithm",
        "theta of 1 or more as a test: |g|^2 holds the noise, and all batches pass",
        "networks with BatchNorm, whose examples have no gradients of their own",
    )

    theta: Positive = NORM_LIMIT
    population_size: PositiveInt | None = None
    smoothing: Smoothing = 0.0

    def __post_init__(self) -> None:
        """Check also that no batch can be larger than the population."""
        AtIntervals.__post_init__(self)
        if self.population_size is not None and self.max > self.population_size:
            raise BatchSizeError(
                f"max needs to be at most population_size={self.population_size}, got "
                f"{self.max}."
            )

    @property
    def needs(self) -> tuple[Need, ...]:
        """Variance and squared norm of the gradient."""
        return Need("variance_trace", self.every), Need("grad_sq_norm", self.every)

    def memory(self) -> Mapping[str, Any]:
        """Return the averages, and what they count."""
        return {"variance": 0.0, "grad_sq_norm": 0.0, "weight": 0.0}

    def wanted(self, memory: State, observation: Observation) -> Wanted:
        """Test the batch of the reading."""
        new = {
            name: averaged(memory[name], value, self.smoothing)
            for name, value in (
                ("variance", float(observation.variance_trace or 0.0)),
                ("grad_sq_norm", float(observation.grad_sq_norm or 0.0)),
                ("weight", 1.0),
            )
        }
        size = int(observation.batch_size or 0)
        if size < 2:
            return Wanted(None, "the batch was of one example", memory)
        test = norm_test_of_variance(
            new["variance"] / new["weight"],
            new["grad_sq_norm"] / new["weight"],
            size,
            limit=self.theta,
            population_size=self.population_size,
        )
        return Wanted(_grown(memory["batch_size"], test), _text(test), new)


@dataclass(frozen=True, kw_only=True)
class InnerProductTest(AtIntervals):
    r"""Grow the batch when the inner-product test of its gradient fails.

    .. math:: \frac{\mathrm{Var}_i \langle g_i, g \rangle}{m} \le \theta^2 |g|^4

    The mean gradient is then a descent direction in most samples. With ``nu`` the
    orthogonality test has to pass too (the *augmented* test). A failed test sets the
    batch to the smallest that would have passed, rounded up; it never shrinks.

    The authors' program also tests an average gradient of past updates where the batch
    has not grown for some time; that is left out.

    Attributes:
        theta: ``θ``.
        nu: ``ν`` of the orthogonality test, such as ``tan 80° = 5.67``; ``None`` for
            the inner-product test alone.
        batch_size: Examples of the first update; ``min`` by default.
        min: Smallest batch size, at least 2.
        max: Largest batch size.
        every: Interval between tests.
        hysteresis: A change smaller than this share of the present size is not made.

    Source:
        Bollapragada, Byrd and Nocedal 2018, arXiv:1710.11258, sections 2 and 3.
    """

    name = "inner_product_test"
    rule = (
        "if Var_i <g_i, g> / m > theta^2 |g|^4 (or, with nu, the orthogonality test "
        "fails) then m = the smallest batch that passes; it never shrinks"
    )
    sources = ("bollapragada2018adaptive",)
    refuses = (
        "to repeat the failed update with the larger batch, which is another algorithm",
        "accumulated micro-batches: inner products need all examples at once",
        "networks with BatchNorm, whose examples have no gradients of their own",
    )

    theta: Positive = NORM_LIMIT
    nu: Positive | None = None

    @property
    def needs(self) -> tuple[Need, ...]:
        """The constants with which the batch passes the tests."""
        inner = Need("inner_product_test", self.every)
        orthogonality = Need("orthogonality_test", self.every)
        return (inner,) if self.nu is None else (inner, orthogonality)

    def memory(self) -> Mapping[str, Any]:
        """Return nothing: each batch is tested by itself."""
        return {}

    def wanted(self, memory: State, observation: Observation) -> Wanted:
        """Test the batch of the reading."""
        size = int(observation.batch_size or 0)
        if size < 2:
            return Wanted(None, "the batch was of one example", {})
        limits = {"inner_product_test": self.theta, "orthogonality_test": self.nu}
        tests = [
            SampleTest.of_statistic(
                float(observation.value(need.name) or 0.0),
                size,
                limit=limits[need.name] or NORM_LIMIT,
            )
            for need in self.needs
        ]
        largest = max(tests, key=lambda test: (not test.passed, test.batch_size))
        return Wanted(_grown(memory["batch_size"], largest), _text(largest), {})


def _grown(size: int, test: SampleTest) -> float:
    """The smallest batch that passes, rounded up; the present one if that is larger."""
    if test.passed or math.isnan(test.batch_size):
        return float(size)
    wanted = test.batch_size
    return max(float(size), wanted if math.isinf(wanted) else math.ceil(wanted))


def _text(test: SampleTest) -> str:
    outcome = "passes" if test.passed else "fails"
    return f"{outcome}: {test.statistic:.4g} against {test.limit:.4g}"
