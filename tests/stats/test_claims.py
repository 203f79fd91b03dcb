"""Contrasts and their paired data."""

import math

import numpy as np
import pytest

from noisekit import stats
from noisekit.core.errors import UsageError
from noisekit.stats import Claim, SeedSample, claim_titles


def contrast(**changes: object) -> Claim:
    fields = {
        "name": "sharper",
        "quantity": "lambda_max",
        "treatment": "large",
        "reference": "small",
        "snapshot": "loss_0.05",
        "scale": "ratio",
        "margin": 1.5,
    }
    return stats.contrast(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": 0.5}, "'sharper' needs a finite margin above 1 for a ratio, got 0"),
        ({"scale": "log"}, "'sharper' needs scale 'ratio' or 'difference', got 'log'"),
        ({"reference": "large"}, "needs two different groups, got 'large' twice"),
        ({"scale": "difference", "margin": -1.0}, "above 0 for a difference, got -1"),
    ],
)
def test_a_contrast_that_cannot_be_judged_is_refused(changes, message) -> None:
    """Catches: a fault that shows only after hours of runs."""
    with pytest.raises(UsageError, match=message):
        contrast(**changes)


def test_a_contrast_is_descriptive_unless_it_says_primary() -> None:
    """Catches: a growing family of primary contrasts by default."""
    assert not contrast().primary


def test_pairing_by_seed_keeps_every_seed() -> None:
    """Catches: pairing by position; seeds of one arm only dropped in silence."""
    sample = SeedSample.by_seed(
        {2: 20.0, 0: 0.5, 1: 10.0}, {1: 1.0, 2: 2.0, 5: 5.0}, seeds=range(7)
    )
    assert sample.seeds == (0, 1, 2, 3, 4, 5, 6)
    treatment, reference = sample.complete()
    np.testing.assert_array_equal(treatment, [10.0, 20.0])
    np.testing.assert_array_equal(reference, [1.0, 2.0])
    assert math.isnan(sample.reference[0])
    assert math.isnan(sample.treatment[5])
    assert math.isnan(sample.treatment[6])


def test_an_infinite_value_is_no_complete_pair() -> None:
    """Catches: the loss of a diverged run entering a mean."""
    sample = SeedSample((0, 1), (math.inf, 1.0), (1.0, 1.0))
    assert sample.complete()[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("seeds", "values", "message"),
    [
        ((0, 1), (1.0,), "got 2 seeds, 1 treatment and 1 reference values; write NaN"),
        ((0, 0), (1.0, 2.0), r"each seed once, got \[0, 0\]"),
    ],
)
def test_data_that_are_not_paired_are_refused(seeds, values, message) -> None:
    """Catches: zip that stops at the shorter arm."""
    with pytest.raises(UsageError, match=message):
        SeedSample(seeds, values, values)


def test_contrasts_have_one_title_each() -> None:
    """Catches: two rows under one name; an internal name where words were given."""
    titles = claim_titles(
        [
            contrast(description="same rate"),
            contrast(name="error", quantity="test_error", description="same rate"),
            contrast(name="late_trace", quantity="hessian_trace"),
        ]
    )
    assert titles == {
        "sharper": "Largest Hessian eigenvalue: same rate",
        "error": "Test error: same rate",
        "late_trace": "Late trace",
    }
