"""Planted nulls and planted effects: what ``docs/claims.md`` says of verdicts holds."""

import pytest

from noisekit.stats import Claim, SeedSample, Value, Verdict, judge
from tests.stats.power import decided_rightly, false_share, shares


@pytest.mark.parametrize(
    ("effect", "limit"), [(0.0, 0.05), (0.99, 0.025), (1.01, 0.05)]
)
def test_planted_nulls_are_rarely_judged_falsely(effect: float, limit: float) -> None:
    """Ten seeds, a deviation of half a margin; 3 Monte-Carlo errors above the limit.

    Catches: a verdict by the point estimate; an interval of the wrong level.
    """
    found = shares(effect, 0.5, 10)
    assert false_share(found, effect) <= limit + 3 * (limit * (1 - limit) / 1000) ** 0.5


@pytest.mark.parametrize("effect", [0.0, 2.0])
def test_planted_effects_are_found(effect: float) -> None:
    """Catches: a rule that never decides, which never errs."""
    assert decided_rightly(shares(effect, 0.5, 10), effect) >= 0.95


def one(kind: str, expect: str, mean: float, spread: float = 0.01) -> Verdict:
    """Judge a claim of margin 1 on ten seeds around a mean."""
    claim = Claim(
        name="a",
        statistic=Value(quantity="test_error"),
        margin=1.0,
        kind=kind,  # type: ignore[arg-type]
        expect=expect,  # type: ignore[arg-type]
    )
    values = tuple(mean + spread * (i - 4.5) for i in range(10))
    return judge([claim], {"a": SeedSample(tuple(range(10)), values)})[0].verdict


@pytest.mark.parametrize(
    ("kind", "expect", "mean", "spread", "verdict"),
    [
        ("identity", "", 0.2, 0.01, Verdict.PASSED),
        ("identity", "", 0.2, 0.0, Verdict.PASSED),  # exact, without any spread
        ("identity", "", 3.0, 0.0, Verdict.FAILED),
        ("identity", "larger", 3.0, 0.01, Verdict.FAILED),
        ("control", "larger", 3.0, 0.01, Verdict.PASSED),
        ("control", "larger", 0.2, 0.01, Verdict.FAILED),
        ("control", "smaller", 3.0, 0.01, Verdict.FAILED),
        ("control", "", 0.0, 0.01, Verdict.PASSED),
        ("control", "larger", 1.0, 0.5, Verdict.NOT_RESOLVED),
        ("claim", "larger", 3.0, 0.01, Verdict.LARGER),
        ("claim", "", 3.0, 0.0, Verdict.NOT_RESOLVED),
    ],
)
def test_checks_of_the_instrument_pass_or_fail(
    kind, expect, mean, spread, verdict
) -> None:
    """Catches: a broken control that passes; an exact identity that is not resolved."""
    assert one(kind, expect, mean, spread) is verdict


def test_a_check_belongs_to_no_family() -> None:
    """Catches: a claim's interval widened for a check."""
    values = tuple(0.8 + 0.05 * i for i in range(10))
    sample = SeedSample(tuple(range(10)), values)
    stated = [
        Claim(
            name=name,
            statistic=Value(quantity="test_error"),
            margin=1.0,
            kind=kind,
            primary=kind == "claim",
        )
        for name, kind in (("a", "claim"), ("b", "identity"), ("c", "control"))
    ]
    results = judge(stated, dict.fromkeys("abc", sample))
    assert [result.num_tests for result in results] == [1, 1, 1]
