"""Bootstrap over seeds and images at once."""

import math

import numpy as np
import pytest
from scipy import stats

from noisekit.core.errors import UsageError
from noisekit.core.results import Status
from noisekit.stats import (
    crossed_difference,
    hierarchical_bootstrap,
)
from tests.reference.stats import answers, weighted_two_way_mean


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_two_way_resamples_are_those_of_drawn_rows_and_columns() -> None:
    """Mean and spread over resamples equal those of explicit draws.

    Catches: images drawn anew for each seed; seeds only; the sign of the difference.
    """
    first, second, _ = answers(generator(10), shape=(6, 40), hardness=(-0.9, -0.6))
    got = hierarchical_bootstrap(
        first, second, generator=generator(11), num_resamples=20_000
    )
    excess = (~first).astype(float) - (~second).astype(float)
    draw = generator(12)
    means = [
        weighted_two_way_mean(excess, draw.integers(0, 6, 6), draw.integers(0, 40, 40))
        for _ in range(20_000)
    ]
    assert got.effect == pytest.approx(np.mean(~first) - np.mean(~second))
    assert got.stderr == pytest.approx(np.std(means), rel=0.03)
    want = np.quantile(means, [0.025, 0.975])
    ends = [got.interval.low, got.interval.high]
    # A 2.5 % quantile of 20,000 draws errs by 0.019 standard deviations; of two, 3.5 x.
    np.testing.assert_allclose(ends, want, atol=0.095 * np.std(means), rtol=0)


def test_errors_over_images_cover_other_images() -> None:
    """300 planted experiments of 10 seeds and 300 images, against the truth.

    Catches: seeds alone as the source of error, which covers in about 70 %.
    """
    source, resample = generator(13), generator(14)
    boot = crossed = seeds_only = 0
    for _ in range(300):
        first, second, truth = answers(source, shape=(10, 300), seed_sd=0.1)
        boot += hierarchical_bootstrap(
            first, second, generator=resample, num_resamples=300
        ).interval.contains(truth)
        crossed += crossed_difference(first, second).interval().contains(truth)
        per_seed = first.mean(axis=1) - second.mean(axis=1)
        plain = stats.ttest_1samp(-per_seed, 0.0).confidence_interval(0.95)
        seeds_only += plain.low <= truth <= plain.high
    slack = 3.5 * math.sqrt(0.95 * 0.05 / 300)
    assert boot / 300 > 0.95 - slack
    assert crossed / 300 > 0.93 - slack
    assert seeds_only / 300 < 0.85


def test_arms_that_never_differ_are_not_resolved() -> None:
    """Catches: certainty from two arms that give the same answers."""
    table = generator(16).random((4, 20)) < 0.9
    assert crossed_difference(table, table).status is Status.NOT_RESOLVED
    assert not crossed_difference(table, table).interval().bounded
    got = hierarchical_bootstrap(table, table, generator=generator(1))
    assert got.status is Status.NOT_RESOLVED
    assert not got.interval.bounded


TABLE = np.ones((3, 5), dtype=bool)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (TABLE, TABLE[:, :4], r"same in both arms, got shapes \(3, 5\) and \(3, 4\)"),
        (TABLE.astype(float), TABLE, "true and false .* got dtypes float64 and bool"),
        (TABLE[:1], TABLE[:1], "at least 2 seeds and 2 images, got 1 and 5"),
        (TABLE[0], TABLE[0], r"one row per seed .* got shapes \(5,\)"),
    ],
)
def test_tables_that_do_not_match_are_refused(first, second, message) -> None:
    """Catches: broadcasting; error probabilities taken for answers."""
    with pytest.raises(UsageError, match=f"over seeds and images .*{message}"):
        hierarchical_bootstrap(first, second, generator=generator(1))
    with pytest.raises(UsageError, match=f"over seeds and images .*{message}"):
        crossed_difference(first, second)


def test_plans_that_give_no_interval_are_refused() -> None:
    with pytest.raises(UsageError, match="images needs a level between 0 and 1, got"):
        hierarchical_bootstrap(TABLE, TABLE, generator=generator(1), level=95.0)
    with pytest.raises(UsageError, match="at least 100 resamples, got 10"):
        hierarchical_bootstrap(TABLE, TABLE, generator=generator(1), num_resamples=10)
