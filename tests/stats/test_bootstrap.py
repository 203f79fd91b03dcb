"""Bootstrap over pairs, and over seeds and images at once."""

import math

import numpy as np
import pytest
from scipy import stats

from noisekit.core.errors import UsageError
from noisekit.core.results import Status
from noisekit.stats import (
    crossed_difference,
    hierarchical_bootstrap,
    paired_bootstrap,
)
from tests.reference.stats import answers, weighted_two_way_mean


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_paired_intervals_are_scipys(method: str, scale: str) -> None:
    """Skewed data; both draw 50,000 resamples, so ends agree to their own noise.

    Catches: no acceleration; bias with the wrong sign; arms resampled apart.
    """
    first = generator(1).exponential(1.0, 12) + 0.1
    second = generator(2).exponential(0.5, 12) + 0.1
    rows = np.log(first / second) if scale == "ratio" else first - second
    want = stats.bootstrap(
        (rows,),
        np.mean,
        n_resamples=50_000,
        batch=1000,
        method="BCa" if method == "bca" else "percentile",
        rng=generator(3),
    )
    got = paired_bootstrap(
        first,
        second,
        generator=generator(4),
        scale=scale,
        method=method,
        num_resamples=50_000,
    )
    ends = np.array([got.interval.low, got.interval.high])
    if scale == "ratio":
        ends = np.log(ends)
    noise = 0.03 * want.standard_error
    np.testing.assert_allclose(ends, want.confidence_interval, atol=noise, rtol=0)
    assert got.stderr == pytest.approx(want.standard_error, rel=0.02)


def test_bca_leans_towards_the_long_tail() -> None:
    """Catches: the skewness correction left out or mirrored."""
    rows = np.array([0.0, 0.1, 0.2, 0.3, 0.2, 0.1, 0.0, 5.0])
    zeros = np.zeros(8)
    plain = paired_bootstrap(rows, zeros, generator=generator(5), method="percentile")
    bca = paired_bootstrap(rows, zeros, generator=generator(5))
    assert bca.interval.low > plain.interval.low
    assert bca.interval.high > plain.interval.high


def test_five_pairs_undercover_as_documented() -> None:
    """The number by which the documentation prefers the t-interval.

    Catches: a claim in the documentation that is not so.
    """
    draws = generator(6).normal(0.3, 1.0, (1500, 5))
    resample = generator(7)
    hits = [
        paired_bootstrap(
            row, np.zeros(5), generator=resample, num_resamples=500
        ).interval.contains(0.3)
        for row in draws
    ]
    assert np.mean(hits) == pytest.approx(0.84, abs=3.5 * math.sqrt(0.84 * 0.16 / 1500))


def test_equal_seeds_give_equal_resamples() -> None:
    """Catches: a hidden global generator."""
    first, second = generator(8).normal(size=(2, 6))
    runs = [paired_bootstrap(first, second, generator=generator(9)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_constant_differences_are_not_resolved() -> None:
    """Catches: division by zero in the skewness; an interval of zero width."""
    got = paired_bootstrap([1.0, 2.0, 3.0], [0.0, 1.0, 2.0], generator=generator(1))
    assert got.status is Status.NOT_RESOLVED
    assert not got.interval.bounded


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
    with pytest.raises(
        UsageError, match=r"paired bootstrap needs a level between 0 an"
    ):
        paired_bootstrap([1, 2], [2, 1], generator=generator(1), level=95.0)
    with pytest.raises(UsageError, match="at least 100 resamples, got 10"):
        hierarchical_bootstrap(TABLE, TABLE, generator=generator(1), num_resamples=10)
