"""Claims of several sets of runs on one page."""

from pathlib import Path

import pytest

from noisekit.core.errors import EmptyDataError
from noisekit.report import build_trial, judged_claims
from noisekit.report.trial import trial_page
from tests.report.samples import make_runs, read

GROUPS = {"treatment": "batch_size=128", "reference": "small"}
SHARPER = {
    "name": "sharper",
    "statistic": {
        "name": "ratio",
        "quantity": "lambda_max",
        "at": "loss_0.05",
        **GROUPS,
    },
    "scale": "ratio",
    "margin": 1.5,
    "primary": True,
    "expect": "smaller",
    "paper": "9 times larger",
    "account": "sharp_minima",
    "description": "same training loss",
}
UPDATES = {
    "name": "equal_updates",
    "statistic": {"name": "ratio", "quantity": "step", "at": "equal_epochs", **GROUPS},
    "scale": "ratio",
    "margin": 1.01,
    "kind": "identity",
}
PLANTED = {
    "name": "planted",
    "statistic": {"name": "value", "quantity": "test_error", "treatment": "small"},
    "margin": 0.001,
    "null": 0.016,
    "kind": "control",
    "expect": "larger",
}
RECIPE = {"name": "toy", "profile": "demo", "verdicts": True}


def recipe(*claims: dict[str, object]) -> dict[str, object]:
    return {**RECIPE, "claims": list(claims)}


def test_claims_are_listed_by_account_and_checks_last(tmp_path: Path) -> None:
    """Catches: a verdict on an account; a check counted as a claim; a lost anchor."""
    sets = [
        make_runs(tmp_path / "a", recipe=recipe(SHARPER, UPDATES)),
        make_runs(tmp_path / "b", recipe={**recipe(SHARPER), "name": "other"}),
    ]
    page = read(build_trial(sets, tmp_path / "trial.html"))
    words = page.words
    assert words.index("Sharp minima") < words.index("Checks of the instrument")
    assert "In the paper: 9 times larger" in words
    assert "against the paper" in words
    assert "passed" in words
    assert "Rules broken: " in words
    assert {"set-1-claim-sharper", "set-2-claim-sharper"} <= set(page.values("id"))
    assert "2 claims of 2 experiments came out as: 2 larger." in words
    assert "no account as a whole is confirmed or refuted" in words
    assert "Check failed" not in words


def test_a_control_that_fails_is_on_top(tmp_path: Path) -> None:
    """Catches: a broken instrument told below its verdicts, or not at all."""
    control = {**PLANTED, "statistic": {**PLANTED["statistic"], "at": "equal_epochs"}}
    runs = make_runs(tmp_path / "a", recipe=recipe(SHARPER, control))
    [_, result] = judged_claims(runs)
    assert str(result.verdict) in ("failed", "not resolved")
    words = read(build_trial([runs], tmp_path / "trial.html")).words
    assert words.index("Check failed.") < words.index("Sharp minima")
    assert "none of these verdicts supports anything" in words


def test_runs_without_claims_make_no_trial(tmp_path: Path) -> None:
    """Catches: an empty page that looks like a result."""
    with pytest.raises(EmptyDataError, match="claims, got toy · demo, which states"):
        trial_page([make_runs(tmp_path, recipe=recipe())])


def test_a_group_that_no_run_belongs_to_is_not_comparable(tmp_path: Path) -> None:
    """Catches: a traceback in place of the page for one claim of a lost arm."""
    lost = {**SHARPER, "statistic": {**SHARPER["statistic"], "treatment": "gone"}}
    [result] = judged_claims(make_runs(tmp_path, recipe=recipe(lost)))
    assert str(result.verdict) == "not comparable"
    assert "got 'gone', which none belongs to; arms are large, small" in result.reason
