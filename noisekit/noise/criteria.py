"""Whether a batch is large enough, by the rules of the literature.

Each rule compares the sampling error of the mean gradient with its length. The
statistic is the value of the rule's constant at which the batch just passes.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.noise.step_statistics import (
    inner_product_statistic,
    orthogonality_statistic,
)

NORM_LIMIT = 0.9
"""θ of the norm and inner-product tests, a customary choice."""

ORTHOGONALITY_LIMIT = math.tan(math.radians(80))
"""ν of the orthogonality test, a customary choice: an angle of 80 degrees."""


@dataclass(frozen=True, slots=True)
class SampleTest:
    """Whether a batch is large enough by one rule.

    Attributes:
        statistic: The smallest constant with which the batch passes; infinite where
            the mean gradient is zero.
        limit: The rule's constant.
        passed: Whether the statistic is within the limit.
        batch_size: The smallest batch that would pass, were gradient and variance
            those of this batch; not rounded [examples].
    """

    statistic: float
    limit: float
    passed: bool
    batch_size: float

    @classmethod
    def of_statistic(
        cls, statistic: float, num_examples: int, *, limit: float
    ) -> "SampleTest":
        """Return the test of a batch whose statistic is known, such as a reading's.

        Args:
            statistic: The smallest constant with which the batch passes.
            num_examples: Examples of the batch.
            limit: The rule's constant.

        Raises:
            BatchSizeError: If there are fewer than 2 examples.
            UsageError: If ``limit`` is not positive.
        """
        _check(num_examples, limit, None)
        ratio = statistic / limit
        wanted = num_examples * ratio * ratio  # a power would raise where it overflows
        return cls(statistic, limit, statistic <= limit, wanted)


def norm_test(
    mean_sq_norm: float,
    grad_sq_norm: float,
    num_examples: int,
    *,
    limit: float = NORM_LIMIT,
    population_size: int | None = None,
) -> SampleTest:
    r"""Test whether the sampling error of the mean gradient is shorter than itself.

    .. math:: \frac{V}{n} \frac{N - n}{N - 1} \le \theta^2 |\bar g|^2, \quad
              V = \frac{n}{n - 1} (S_1 - |\bar g|^2)

    ``n`` times the squared statistic saturates at about ``n`` where noise dominates:
    it is not a noise scale, since ``|ḡ|²`` contains the noise.

    Args:
        mean_sq_norm: ``S_1``, mean of ``|g_i|²`` over the batch [loss²/param²].
        grad_sq_norm: ``|ḡ|²`` of the batch's mean gradient [loss²/param²].
        num_examples: Examples ``n`` of the batch.
        limit: ``θ``.
        population_size: ``N`` of the data set that the batch is drawn from without
            replacement; unlimited by default.

    Raises:
        BatchSizeError: If there are fewer than 2 examples, or more than there are.
        UsageError: If ``limit`` is not positive.

    Source:
        Byrd, Chin, Nocedal and Wu 2012, "Sample size selection in optimization
        methods for machine learning".

    Example:
        >>> test = norm_test(5.0, 1.0, 16, limit=0.5)
        >>> test.passed, round(test.statistic, 3), round(test.batch_size, 1)
        (False, 0.516, 17.1)
    """
    _check(num_examples, limit, population_size)
    variance = num_examples / (num_examples - 1) * (mean_sq_norm - grad_sq_norm)
    return norm_test_of_variance(
        max(0.0, variance),  # negative by rounding only
        grad_sq_norm,
        num_examples,
        limit=limit,
        population_size=population_size,
    )


def norm_test_of_variance(
    variance_trace: float,
    grad_sq_norm: float,
    num_examples: int,
    *,
    limit: float = NORM_LIMIT,
    population_size: int | None = None,
) -> SampleTest:
    """Test the same of a batch whose ``V`` is known, such as a reading's.

    Args:
        variance_trace: ``V``, ``n - 1`` denominator [loss²/param²].
        grad_sq_norm: ``|ḡ|²`` of the batch's mean gradient [loss²/param²].
        num_examples: Examples ``n`` of the batch.
        limit: ``θ``.
        population_size: ``N`` of the data set that the batch is drawn from without
            replacement; unlimited by default.

    Raises:
        BatchSizeError: If there are fewer than 2 examples, or more than there are.
        UsageError: If ``limit`` is not positive.

    Example:
        >>> test = norm_test_of_variance(3.0, 0.1, 50, limit=0.5)
        >>> test.passed, round(test.batch_size)
        (False, 120)
    """
    _check(num_examples, limit, population_size)
    wanted = _ratio(variance_trace, limit**2 * grad_sq_norm)
    left = 1.0
    if population_size is not None:
        left = (population_size - num_examples) / (population_size - 1)
        wanted = _finite_population(wanted, population_size)
    error = _ratio(variance_trace, num_examples * grad_sq_norm)
    statistic = math.sqrt(left * error) if left else 0.0  # all examples: no error
    return SampleTest(statistic, limit, statistic <= limit, wanted)


def inner_product_test(
    inner_products: Tensor, *, limit: float = NORM_LIMIT
) -> SampleTest:
    r"""Test whether the mean gradient is a descent direction in most samples.

    .. math:: \frac{1}{n (n - 1)} \sum_i (\langle g_i, \bar g \rangle - |\bar g|^2)^2
              \le \theta^2 |\bar g|^4

    Args:
        inner_products: ``<g_i, ḡ>`` of every example of the batch [loss²/param²].
        limit: ``θ``.

    Raises:
        BatchSizeError: If there are fewer than 2 examples.
        UsageError: If ``limit`` is not positive.

    Source:
        Bollapragada, Byrd and Nocedal 2018, arXiv:1710.11258, eq. 2.6.
    """
    n = len(inner_products)
    _check(n, limit, None)
    products = inner_products.double()
    if not products.any():
        return SampleTest.of_statistic(0.0, n, limit=limit)
    statistic = float(inner_product_statistic(products, 1 / n))
    return SampleTest.of_statistic(statistic, n, limit=limit)


def orthogonality_test(
    sq_norms: Tensor, inner_products: Tensor, *, limit: float = ORTHOGONALITY_LIMIT
) -> SampleTest:
    r"""Test whether components orthogonal to the mean gradient are small.

    .. math:: \frac{1}{n (n - 1)} \sum_i \Big| g_i -
              \frac{\langle g_i, \bar g \rangle}{|\bar g|^2} \bar g \Big|^2
              \le \nu^2 |\bar g|^2

    Args:
        sq_norms: ``|g_i|²`` of every example of the batch [loss²/param²].
        inner_products: ``<g_i, ḡ>``, in the same order [loss²/param²].
        limit: ``ν``.

    Raises:
        BatchSizeError: If there are fewer than 2 examples.
        UsageError: If ``limit`` is not positive or the lengths differ.

    Source:
        Bollapragada, Byrd and Nocedal 2018, arXiv:1710.11258, eq. 3.3.
    """
    n = len(sq_norms)
    _check(n, limit, None)
    if len(inner_products) != n:
        raise UsageError(
            "an orthogonality test needs a norm and an inner product per example, "
            f"got {n} and {len(inner_products)}."
        )
    norms, products = sq_norms.double(), inner_products.double()
    if float(products.sum()) <= 0:  # n |ḡ|² = 0: no direction to be orthogonal to
        statistic = math.inf if norms.any() else 0.0
    else:
        share = 1 / n  # of an example in the batch's mean: u_i = g_i / n
        parts = norms.sum() * share**2, products * share
        statistic = float(orthogonality_statistic(*parts, share))
    return SampleTest.of_statistic(statistic, n, limit=limit)


def gradient_diversity(mean_sq_norm: float, grad_sq_norm: float, n: int) -> float:
    r"""Return ``Σ|g_i|² / |Σ g_i|²`` of a finite set of ``n`` examples.

    ``n`` times it is the batch size up to which parallel SGD loses little. Over a
    whole data set ``n Δ = 1 + B_simple`` exactly; of a batch it is a biased estimate
    of its data set's, since ``|ḡ|²`` contains the noise: use the noise scale there.

    Args:
        mean_sq_norm: Mean of ``|g_i|²`` over the set [loss²/param²].
        grad_sq_norm: ``|ḡ|²`` of the set's mean gradient [loss²/param²].
        n: Examples of the set.

    Raises:
        BatchSizeError: If the set is empty.

    Source:
        Yin et al. 2018, arXiv:1706.05699.
    """
    if n < 1:
        raise BatchSizeError(f"gradient diversity needs an example, got {n}.")
    return _ratio(mean_sq_norm, n * grad_sq_norm)


def _finite_population(wanted: float, population_size: int) -> float:
    """Size of a sample without replacement with the error of ``wanted`` with."""
    if math.isinf(wanted):
        return float(population_size)
    return wanted * population_size / (population_size - 1 + wanted)


def _ratio(numerator: float, denominator: float) -> float:
    if denominator > 0:
        return numerator / denominator
    return math.inf if numerator > 0 else 0.0


def _check(num_examples: int, limit: float, population_size: int | None) -> None:
    if num_examples < 2:
        raise BatchSizeError(
            f"a test of the batch size needs 2 examples, got {num_examples}; their "
            "variance is not defined for fewer."
        )
    if not limit > 0:
        raise UsageError(f"a test of the batch size needs limit > 0, got {limit}.")
    if population_size is not None and population_size < max(2, num_examples):
        raise BatchSizeError(
            f"a sample of {num_examples} examples needs a population_size of at "
            f"least as many, got {population_size}."
        )
