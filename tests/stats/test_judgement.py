"""Verdicts: which are given, and how often they are false."""

import math

import numpy as np
import pytest

from noisekit.core.errors import NoVerdictError, UsageError
from noisekit.core.results import Estimate
from noisekit.stats import (
    Claim,
    ClaimResult,
    SeedSample,
    Verdict,
    contrast,
    judge,
    require_verdict,
)
from tests.reference.stats import verdict_by_interval

MARGIN = 0.5
SEEDS = tuple(range(10))


def difference(name: str = "a", *, primary: bool = True) -> Claim:
    return contrast(
        name=name,
        quantity="train_loss",
        treatment="large",
        reference="small",
        snapshot="equal_epochs",
        scale="difference",
        margin=MARGIN,
        primary=primary,
    )


def sample(differences: np.ndarray, **changes: object) -> SeedSample:
    seeds = tuple(range(len(differences)))
    return SeedSample(
        seeds, tuple(map(float, differences)), (0.0,) * len(seeds), **changes
    )


def judge_one(differences: np.ndarray, **options: object) -> ClaimResult:
    return judge([difference()], {"a": sample(differences)}, **options)[0]


def spread_around(mean: float) -> np.ndarray:
    """Ten differences with the given mean and a standard error of 0.01."""
    unit = np.arange(10) - 4.5
    return mean + 0.01 * math.sqrt(10) * unit / unit.std(ddof=1)


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        (0.6, Verdict.LARGER),
        (-0.6, Verdict.SMALLER),
        (0.0, Verdict.EQUIVALENT),
        (0.4, Verdict.LARGER_WITHIN_MARGIN),
        (-0.4, Verdict.SMALLER_WITHIN_MARGIN),
        (0.5, Verdict.NOT_RESOLVED),
        # One standard error is 0.01: 95 % needs 2.262 of them, 90 % needs 1.833.
        (0.5 + 0.0227, Verdict.LARGER),
        (0.5 + 0.0225, Verdict.NOT_RESOLVED),
        (0.5 - 0.0184, Verdict.LARGER_WITHIN_MARGIN),
        (0.5 - 0.0182, Verdict.NOT_RESOLVED),
        (0.0227, Verdict.LARGER_WITHIN_MARGIN),
        (0.0225, Verdict.EQUIVALENT),
        (-0.0227, Verdict.SMALLER_WITHIN_MARGIN),
    ],
)
def test_verdicts_turn_where_the_interval_crosses_null_or_margin(mean, verdict) -> None:
    """Inside the margin an interval that excludes no effect is not "equivalent".

    Catches: significance against zero alone; another interval for deciding.
    """
    assert judge_one(spread_around(mean)).verdict is verdict


def test_rule_matches_the_interval_on_random_data() -> None:
    """Catches: a family that counts descriptive contrasts; a wrong level."""
    generator = np.random.default_rng(2)
    for _ in range(400):
        draws = [generator.normal(generator.uniform(-1, 1), 0.3, 10) for _ in range(4)]
        contrasts = [difference(name, primary=name != "d") for name in "abcd"]
        data = {n: sample(d) for n, d in zip("abcd", draws, strict=True)}
        got = [str(r.verdict) for r in judge(contrasts, data)]
        want = [verdict_by_interval(d, MARGIN, 3) for d in draws[:3]]
        assert got == [*want, verdict_by_interval(draws[3], MARGIN, 1)]


def test_a_ratio_is_judged_on_its_logarithm() -> None:
    """Catches: a ratio judged as a difference; margin below 1 on the other side."""
    claim = contrast(
        name="a",
        quantity="lambda_max",
        treatment="large",
        reference="small",
        snapshot="loss_0.05",
        scale="ratio",
        margin=1.5,
    )
    for mean in (-0.6, -0.4, -0.2, 0.2, 0.39, 0.42, 0.6):
        logs = spread_around(mean)
        data = SeedSample(SEEDS, tuple(np.exp(logs)), (1.0,) * 10)
        result = judge([claim], {"a": data})[0]
        assert str(result.verdict) == verdict_by_interval(logs, math.log(1.5), 1)
        assert result.effect == pytest.approx(math.exp(mean))
        assert result.interval.contains(result.effect)


PLANTED = {
    "just inside": (0, 0, 0),
    "just outside": (1, 1, 1),
    "both sides": (1, 0, -1),
    "one decided": (None, 1, 0),
}


@pytest.mark.parametrize("correlation", [-0.49, 0.0, 0.9])
@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_false_verdicts_in_a_family_stay_below_five_percent(
    planted: tuple[int | None, ...], correlation: float
) -> None:
    """3,000 families of three primary contrasts with effects at the margin.

    On the margin an effect belongs to neither side, so each case says on which side it
    counts as lying (None: far beyond, decided rightly in every family). Each of the
    12 cases may err by 3 Monte-Carlo standard errors (1.2 points) above 5 %.

    Catches: no adjustment (up to 14 %).
    """
    generator = np.random.default_rng(31)
    centre = [3.0 if side is None else MARGIN * (side or 1) for side in planted]
    covariance = np.full((3, 3), correlation) + (1.0 - correlation) * np.eye(3)
    draws = generator.multivariate_normal(centre, 0.09 * covariance, (3000, 10))
    contrasts = [difference(name) for name in "abc"]
    false = 0
    for family in draws:  # (10, 3)
        data = {n: sample(family[:, i]) for i, n in enumerate("abc")}
        verdicts = [result.verdict for result in judge(contrasts, data)]
        false += any(
            verdict.decided and verdict.region != (1 if side is None else side)
            for verdict, side in zip(verdicts, planted, strict=True)
        )
    assert false / 3000 <= 0.05 + 3.0 * math.sqrt(0.05 * 0.95 / 3000)


@pytest.mark.parametrize("truth", [0.0, MARGIN])
def test_the_level_is_used_and_not_wasted(truth: float) -> None:
    """Of three independent contrasts one or more errs in 4.9 %, not far less.

    At no effect an error is a direction; just outside the margin, a verdict inside it.

    Catches: a factor of 2m instead of m (2.5 %); a 95 % interval for equivalence.
    """
    generator = np.random.default_rng(32)
    draws = generator.normal(truth, 0.1, (3000, 3, 10))
    contrasts = [difference(name) for name in "abc"]
    false = 0
    for family in draws:
        data = dict(zip("abc", map(sample, family), strict=True))
        verdicts = [result.verdict for result in judge(contrasts, data)]
        false += any(
            verdict.decided and (verdict.region == 0 if truth else verdict.direction)
            for verdict in verdicts
        )
    assert abs(false / 3000 - 0.049) < 3.5 * math.sqrt(0.049 * 0.951 / 3000)


@pytest.mark.parametrize(
    ("effect", "right"),
    [(1.0, Verdict.LARGER), (-1.0, Verdict.SMALLER), (0.0, Verdict.EQUIVALENT)],
)
def test_clear_effects_are_found(effect: float, right: Verdict) -> None:
    """A margin away from the margin at 0.3 spread, ten seeds decide nearly always.

    Catches: an adjustment that leaves no power; verdicts on the wrong side.
    """
    generator = np.random.default_rng(33)
    draws = generator.normal(effect, 0.3, (300, 10))
    contrasts = [difference(name) for name in "abc"]
    found = [
        judge(contrasts, {n: sample(row) for n in "abc"})[0].verdict for row in draws
    ]
    assert found.count(right) >= 0.85 * 300
    assert all(v.region == right.region for v in found if v.decided)


def test_the_interval_that_decides_is_the_one_in_the_result() -> None:
    """Catches: a 90 % interval that decides while a 95 % one is shown."""
    generator = np.random.default_rng(34)
    contrasts = [difference(name) for name in "abc"]
    levels = set()
    for mean in np.linspace(-1.0, 1.0, 201):
        row = sample(generator.normal(mean, 0.3, 10))
        result = judge(contrasts, dict.fromkeys("abc", row))[0]
        low, high = result.interval.low, result.interval.high
        verdict = result.verdict
        assert (verdict is Verdict.LARGER) == (low > MARGIN)
        inside = low > -MARGIN and high < MARGIN
        assert (verdict.decided and verdict.region == 0) == inside
        if inside:
            assert bool(verdict.direction) == (not low < 0 < high)
        if verdict.direction:
            assert result.p_value <= 0.05
        levels.add(round(1 - result.interval.level, 6))
    assert levels == {round(0.05 / 3, 6), round(0.1 / 3, 6)}


def test_a_direction_that_is_open_leaves_the_contrast_open() -> None:
    """The 90 % interval lies inside the margin above 0, the 95 % one includes 0.

    Catches: "equivalent" beside an interval that excludes no effect.
    """
    unit = np.arange(10) - 4.5
    half = 0.25 / 2.0  # of two standard errors: between 1.833 and 2.262
    row = 0.25 + half * math.sqrt(10) * unit / unit.std(ddof=1)
    assert judge_one(row).verdict is Verdict.NOT_RESOLVED


def crossed(width: float) -> Estimate:
    """Return a difference of 0.6 with a standard error over seeds and images."""
    return Estimate(0.6, stderr=width, dof=40.0, num_samples=10)


@pytest.mark.parametrize(
    ("stderr", "verdict", "over"),
    [
        (0.2, Verdict.NOT_RESOLVED, "seeds and images"),
        (0.001, Verdict.LARGER, "seeds"),
    ],
)
def test_the_wider_of_both_errors_decides_test_error(stderr, verdict, over) -> None:
    """Catches: seeds alone deciding; a narrower interval over images taken."""
    row = sample(spread_around(0.6), crossed=crossed(stderr))
    result = judge([difference()], {"a": row})[0]
    assert result.verdict is verdict
    assert result.error_over == over
    alone = judge_one(spread_around(0.6)).interval
    assert result.interval.high - result.interval.low >= alone.high - alone.low


def test_what_only_adjustment_undid_says_so() -> None:
    """Catches: a reader who computes the 95 % interval and finds no word about it."""
    contrasts = [difference(name) for name in "abc"]
    row = sample(spread_around(0.5 + 0.025))
    result = judge(contrasts, dict.fromkeys("abc", row))[0]
    assert result.verdict is Verdict.NOT_RESOLVED
    assert result.interval.low < MARGIN
    assert result.reason == (
        "larger by itself, not after adjusting for 3 primary claims"
    )


def test_the_family_keeps_its_size_when_one_is_not_comparable() -> None:
    """Catches: a family counted after looking at which runs succeeded."""
    contrasts = [difference(name) for name in "abc"]
    row = sample(spread_around(0.5 + 0.025))
    broken = sample(spread_around(0.0), not_comparable="train loss 0.05 against 0.2")
    results = judge(contrasts, {"a": row, "b": broken, "c": broken})
    assert results[0].verdict is Verdict.NOT_RESOLVED
    assert results[0].num_tests == 3
    assert results[1].verdict is Verdict.NOT_COMPARABLE
    assert results[1].reason == "train loss 0.05 against 0.2"
    assert math.isnan(results[1].p_value)
    assert not results[1].verdict.decided


def with_missing() -> SeedSample:
    values = dict(enumerate(spread_around(0.6).tolist()))
    reference = dict.fromkeys(range(8), 0.0)
    return SeedSample.by_seed(values, reference)


def test_a_missing_pair_forbids_a_primary_verdict() -> None:
    """Catches: judging the survivors of a diverging arm."""
    result = judge([difference()], {"a": with_missing()})[0]
    assert result.verdict is Verdict.NOT_COMPARABLE
    assert result.reason.startswith("2 of 10 pairs are missing (a run diverged")
    assert (result.num_pairs, result.num_missing) == (8, 2)


@pytest.mark.parametrize(
    ("primary", "options"), [(False, {}), (True, {"allow_missing": True})]
)
def test_missing_pairs_that_are_allowed_are_named(primary, options) -> None:
    """Catches: pairs dropped in silence."""
    claim = difference(primary=primary)
    result = judge([claim], {"a": with_missing()}, **options)[0]
    assert result.verdict is Verdict.LARGER
    assert result.reason == "2 of 10 pairs are missing and left out"


@pytest.mark.parametrize(
    ("differences", "reason"),
    [
        ([0.3], "an interval needs at least 2 complete pairs, got 1"),
        ([], "an interval needs at least 2 complete pairs, got 0"),
        ([0.3, 0.3, 0.3], "all 3 pairs agree exactly, so no spread is known"),
    ],
)
def test_too_little_data_is_not_resolved(differences, reason) -> None:
    """Catches: an exception that loses the other contrasts; a verdict from p = 0."""
    result = judge_one(np.array(differences))
    assert result.verdict is Verdict.NOT_RESOLVED
    assert result.reason == reason
    assert not result.interval.bounded


def test_values_without_a_ratio_are_not_resolved() -> None:
    """Catches: log of a negative eigenvalue, and a NaN verdict after it."""
    claim = contrast(
        name="a",
        quantity="lambda_max",
        treatment="large",
        reference="small",
        snapshot="final",
        scale="ratio",
        margin=2.0,
    )
    data = SeedSample((0, 1, 2), (1.0, -1.0, 2.0), (1.0, 1.0, 1.5))
    result = judge([claim], {"a": data})[0]
    assert result.verdict is Verdict.NOT_RESOLVED
    assert result.reason.startswith("1 of 3 pairs have a value at or below zero")
    assert (result.interval.low, result.interval.high) == (0.0, math.inf)


def test_runs_without_claims_are_not_judged() -> None:
    """Catches: a verdict from a smoke run, by whichever way it is asked."""
    result = judge_one(spread_around(0.6), verdicts=False)
    assert result.verdict is Verdict.NOT_JUDGED
    assert result.effect == pytest.approx(0.6)
    assert math.isnan(result.p_value)
    with pytest.raises(NoVerdictError, match=r"'a' needs .*verdicts = true"):
        require_verdict(result)


def test_a_verdict_that_was_given_can_be_required() -> None:
    assert require_verdict(judge_one(spread_around(0.6))) is Verdict.LARGER


def test_names_that_do_not_match_are_refused() -> None:
    """Catches: a misspelt contrast that vanishes from the report."""
    row = sample(spread_around(0.0))
    with pytest.raises(UsageError, match=r"distinct names, got \['a'\] more than once"):
        judge([difference(), difference()], {"a": row})
    with pytest.raises(UsageError, match=r"got none for \['b'\]; give one with not_c"):
        judge([difference("a"), difference("b")], {"a": row})
