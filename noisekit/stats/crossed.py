"""Differences of test error over seeds and images, as crossed random effects."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Status


def crossed_difference(
    treatment_correct: ArrayLike, reference_correct: ArrayLike
) -> Estimate:
    r"""Return the difference in test error with its error over seeds and images.

    Seeds and images are crossed random effects. With the mean squares between seeds
    ``S``, between images ``I`` and of what is left ``R``, the variance of the mean over
    ``s`` seeds and ``i`` images is estimated without bias by ``(S + I - R)/(s i)``;
    ``I - R`` is clamped at zero, so the error is never less than that of the seeds
    alone. A nominal 95 % interval covers in 93 to 96 % at 10 seeds and 540 images, and
    in about 90 % at 100 images of which 2 % are errors, too few for a normal mean.

    Args:
        treatment_correct: Whether each test image was classified rightly, one row per
            seed and one column per image.
        reference_correct: The same seeds and images under the other arm.

    Returns:
        Test error of treatment minus that of reference [fraction]; given the one
        training split. Status ``NOT_RESOLVED`` where the seeds all agree.

    Raises:
        UsageError: If the tables are not two equally large ones of true and false with
            at least 2 seeds and 2 images.

    Source:
        Hillis 2007, "A comparison of denominator degrees of freedom methods for
        multiple observer ROC analysis", with seeds as readers.
    """
    fault = tables_fault(treatment_correct, reference_correct)
    if fault:
        raise UsageError(f"a difference over seeds and images {fault}")
    excess = excess_errors(treatment_correct, reference_correct)  # (seeds, images)
    num_seeds, num_images = excess.shape
    mean = float(excess.mean())
    # Two-way analysis of variance without replication, x = mu + a_s + b_i + e_si:
    # E S = var e + i var a, E I = var e + s var b, E R = var e, and the variance of the
    # mean is var a / s + var b / i + var e / (s i).
    by_seed = excess.mean(axis=1, keepdims=True) - mean  # (seeds, 1)
    by_image = excess.mean(axis=0, keepdims=True) - mean  # (1, images)
    rest = excess - mean - by_seed - by_image
    seeds = num_images * float(np.sum(by_seed**2)) / (num_seeds - 1)
    images = num_seeds * float(np.sum(by_image**2)) / (num_images - 1)
    noise = float(np.sum(rest**2)) / ((num_seeds - 1) * (num_images - 1))
    total = seeds + max(images - noise, 0.0)
    resolved = seeds > 0.0
    return Estimate(
        value=mean,
        stderr=math.sqrt(total / excess.size) if resolved else math.inf,
        error_source=ErrorSource.SEEDS,
        num_samples=num_seeds,
        # Satterthwaite's, with the error of S alone (Hillis 2007).
        dof=(num_seeds - 1) * (total / seeds) ** 2 if resolved else num_seeds - 1,
        status=Status.OK if resolved else Status.NOT_RESOLVED,
    )


def excess_errors(
    treatment_correct: ArrayLike, reference_correct: ArrayLike
) -> NDArray[np.float64]:
    """Return 1 where only treatment errs, -1 where only reference does, else 0."""
    first = np.asarray(treatment_correct).astype(np.float64)
    return np.asarray(reference_correct).astype(np.float64) - first


def tables_fault(treatment_correct: ArrayLike, reference_correct: ArrayLike) -> str:
    """Return what is wrong with two tables of answers, or nothing."""
    first, second = np.asarray(treatment_correct), np.asarray(reference_correct)
    if first.dtype != np.bool_ or second.dtype != np.bool_:
        return (
            "needs tables of true and false (image classified rightly), got dtypes "
            f"{first.dtype} and {second.dtype}; compare predictions with targets first."
        )
    if first.ndim != 2 or first.shape != second.shape:
        return (
            "needs one row per seed and one column per image, the same in both arms, "
            f"got shapes {first.shape} and {second.shape}; keep the seeds and images "
            "that both arms have."
        )
    if min(first.shape) < 2:
        return (
            f"needs at least 2 seeds and 2 images, got {first.shape[0]} and "
            f"{first.shape[1]}."
        )
    return ""
