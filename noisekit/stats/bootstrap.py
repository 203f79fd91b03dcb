"""Bootstrap over seeds, and over seeds and test images at once."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from noisekit.core.errors import UsageError
from noisekit.core.results import Interval, Status
from noisekit.stats.crossed import excess_errors, tables_fault
from noisekit.stats.hypothesis import Scale, paired_effect

Method = Literal["bca", "percentile"]
"""How an interval is read from resamples; BCa corrects bias and skewness."""

_CHUNK = 4_000_000
"""Resample weights held at a time; 32 MB of float64."""


@dataclass(frozen=True, slots=True)
class BootstrapResult:
    """An effect with an interval from resampling.

    Attributes:
        effect: Difference of means, or ratio of geometric means, of the data.
        interval: Confidence interval in the same unit.
        stderr: Standard deviation over resamples; of the logarithm for a ratio.
        num_resamples: Resamples drawn.
        method: How the interval was read from them.
        status: ``NOT_RESOLVED`` where nothing varied between what was resampled.
    """

    effect: float
    interval: Interval
    stderr: float
    num_resamples: int
    method: Method
    status: Status = Status.OK


def paired_bootstrap(
    treatment: ArrayLike,
    reference: ArrayLike,
    *,
    generator: np.random.Generator,
    scale: Scale = "difference",
    level: float = 0.95,
    num_resamples: int = 10_000,
    method: Method = "bca",
) -> BootstrapResult:
    """Return a bootstrap interval of the mean paired effect, resampling pairs.

    To set beside the t-interval, not in its place: resamples of few pairs spread too
    little, and at 5 pairs a nominal 95 % interval covers in about 84 %, at 10 pairs in
    about 90 %, with or without the correction for skewness. Verdicts use
    ``paired_effect``.

    Args:
        treatment: One value per pair.
        reference: The same pairs under the other arm, in the same order.
        generator: Source of the resamples.
        scale: As for ``paired_effect``, which also says what is refused.
        level: Confidence level.
        num_resamples: Resamples to draw.
        method: ``"bca"`` or ``"percentile"``.

    Raises:
        UsageError: If ``level`` is not in (0, 1) or there are under 100 resamples.

    Source:
        Efron 1987, "Better bootstrap confidence intervals".
    """
    fault = _plan_fault(level, num_resamples)
    if fault:
        raise UsageError(f"a paired bootstrap {fault}")
    effect = paired_effect(treatment, reference, scale=scale)
    if effect.estimate.status is not Status.OK:
        interval = effect.interval(level)
        return BootstrapResult(
            effect.effect, interval, math.inf, 0, method, Status.NOT_RESOLVED
        )
    first, second = np.asarray(treatment, float), np.asarray(reference, float)
    ratio = scale == "ratio"
    rows = np.log(first) - np.log(second) if ratio else first - second  # (n,)
    means = np.empty(num_resamples)
    for part in _parts(num_resamples, rows.size):
        means[part] = rows[_draws(generator, part, rows.size)].mean(axis=1)
    tails = np.array([0.5 - level / 2, 0.5 + level / 2])
    if method == "bca":
        tails = _corrected_tails(tails, rows, means)
    low, high = (float(q) for q in np.quantile(means, tails))
    if ratio:
        low, high = math.exp(low), math.exp(high)
    return BootstrapResult(
        effect.effect,
        Interval(low, high, level),
        float(means.std(ddof=1)),
        num_resamples,
        method,
    )


def hierarchical_bootstrap(
    treatment_correct: ArrayLike,
    reference_correct: ArrayLike,
    *,
    generator: np.random.Generator,
    level: float = 0.95,
    num_resamples: int = 5_000,
) -> BootstrapResult:
    """Return an interval of the difference in test error, over seeds and images.

    Seeds and images are drawn with replacement independently of each other, each image
    with its answers under all seeds of both arms, so that the interval speaks for other
    seeds and other images of the same distribution. The training split is one, and
    nothing here varies it. Disagreement that is neither a seed's nor an image's counts
    three times instead of once, so the interval errs on the wide side: at 10 seeds and
    540 images a nominal 95 % interval covers in 96 to 99 %. ``crossed_difference`` is
    narrower and nearer to its level.

    Args:
        treatment_correct: Whether each test image was classified rightly, one row per
            seed and one column per image.
        reference_correct: The same seeds and images under the other arm.
        generator: Source of the resamples.
        level: Confidence level.
        num_resamples: Resamples to draw.

    Returns:
        Test error of treatment minus that of reference [fraction].

    Raises:
        UsageError: If the tables are not two equally large ones of true and false with
            at least 2 seeds and 2 images, or level or resamples are out of range.

    Source:
        Owen 2007, "The pigeonhole bootstrap".
    """
    fault = _plan_fault(level, num_resamples) or tables_fault(
        treatment_correct, reference_correct
    )
    if fault:
        raise UsageError(f"a bootstrap over seeds and images {fault}")
    excess = excess_errors(treatment_correct, reference_correct)  # (seeds, images)
    num_seeds, num_images = excess.shape
    means = np.empty(num_resamples)
    for part in _parts(num_resamples, num_images):
        seed_weights = _weights(generator, part, num_seeds)  # (part, seeds)
        image_weights = _weights(generator, part, num_images)  # (part, images)
        means[part] = np.einsum("bi,bi->b", seed_weights @ excess, image_weights)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    varied = bool(np.ptp(excess) > 0.0)
    interval = (float(low), float(high)) if varied else (-math.inf, math.inf)
    return BootstrapResult(
        float(excess.mean()),
        Interval(*interval, level),
        float(means.std(ddof=1)) if varied else math.inf,
        num_resamples,
        "percentile",
        Status.OK if varied else Status.NOT_RESOLVED,
    )


def _corrected_tails(
    tails: NDArray[np.float64], rows: NDArray[np.float64], means: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Efron's bias and acceleration corrections of the two tail probabilities."""
    centre = rows.mean()
    below = np.mean(means < centre) + 0.5 * np.mean(means == centre)
    edge = 0.5 / means.size  # keeps the bias finite where every resample lies one side
    bias = float(ndtri(np.clip(below, edge, 1.0 - edge)))
    # For a mean, leaving one out moves it against that pair's own deviation.
    influence = rows - centre
    skewness = np.sum(influence**3) / np.sum(influence**2) ** 1.5
    acceleration = skewness / 6.0
    shifted = bias + ndtri(tails)
    return np.asarray(ndtr(bias + shifted / (1.0 - acceleration * shifted)))


def _parts(num_resamples: int, width: int) -> list[slice]:
    rows = max(1, _CHUNK // width)
    return [
        slice(start, min(start + rows, num_resamples))
        for start in range(0, num_resamples, rows)
    ]


def _draws(generator: np.random.Generator, part: slice, size: int) -> NDArray[np.intp]:
    return generator.integers(0, size, (part.stop - part.start, size), dtype=np.intp)


def _weights(
    generator: np.random.Generator, part: slice, size: int
) -> NDArray[np.float64]:
    """How often each of ``size`` things is drawn, over ``size``; one row a resample."""
    count = part.stop - part.start
    drawn = generator.multinomial(size, np.full(size, 1.0 / size), size=count)
    return drawn / size


def _plan_fault(level: float, num_resamples: int) -> str:
    if not 0.0 < level < 1.0:
        return f"needs a level between 0 and 1, got {level}."
    if num_resamples < 100:
        return f"needs at least 100 resamples, got {num_resamples}."
    return ""
