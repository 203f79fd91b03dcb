"""Verdicts of a recorded demo, five seeds, stay what they were under contrasts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.stats import ClaimResult, SeedSample, contrast, judge

RECORDED: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("recorded_demo.json").read_text()
)


@pytest.fixture(scope="module")
def results() -> list[ClaimResult]:
    """Judge the recorded contrasts as claims, all in one family."""
    claims = [contrast(**row["contrast"]) for row in RECORDED]
    data = {
        row["contrast"]["name"]: SeedSample(
            tuple(row["seeds"]),
            tuple(row["treatment"]),
            tuple(row["reference"]),
            not_comparable=row["not_comparable"],
            crossed=estimate(row["crossed"]),
        )
        for row in RECORDED
    }
    return judge(claims, data)


def estimate(recorded: dict[str, Any] | None) -> Estimate | None:
    if recorded is None:
        return None
    return Estimate(error_source=ErrorSource.SEEDS, status=Status.OK, **recorded)


@pytest.mark.parametrize("place", range(len(RECORDED)))
def test_a_recorded_verdict_is_still_given(
    results: list[ClaimResult], place: int
) -> None:
    """Catches: a claim that judges a contrast by another number, scale or level."""
    row, result = RECORDED[place], results[place]
    assert str(result.verdict) == row["verdict"]
    assert result.effect == row["effect"]
    interval = result.interval
    recorded = (row["low"], row["high"], row["level"])
    assert (interval.low, interval.high, interval.level) == recorded
    assert result.error_over == row["error_over"]
    if row["p_value"] is None:
        assert math.isnan(result.p_value)
    else:
        assert result.p_value == pytest.approx(row["p_value"], rel=1e-12)
