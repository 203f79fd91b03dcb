"""Every bundled experiment runs at its smoke profile, and its page is written."""

from pathlib import Path

import pytest

import noisekit as nk
from noisekit.cli.pipeline import write_report
from noisekit.report.comparability import judged_claims
from noisekit.stats import Verdict
from noisekit.train.recipes.catalogue import experiments

_ELSEWHERE = "small_vs_large_batch"
"""Its smoke profile runs in the tests of the command line."""
NAMES = [entry.name for entry in experiments() if entry.name != _ELSEWHERE]


@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_profile_runs_and_reports(name: str, tmp_path: Path) -> None:
    """All runs complete, each claim is computed and none judged, the page has no fault.

    Catches: a recipe whose claims name what its runs never record; an analysis that
    expects another experiment's arms.
    """
    recipe = nk.load_recipe(name, profile="smoke")
    runs = nk.run(recipe, tmp_path / "set", workers=0)
    assert set(runs.runs["status"]) == {"done"}
    results = judged_claims(runs)
    assert len(results) == len(recipe.claims) > 0
    assert {result.verdict for result in results} <= {
        Verdict.NOT_JUDGED,
        Verdict.NOT_COMPARABLE,
    }
    _, path, faults = write_report(tmp_path / "set", None)
    assert not faults
    page = path.read_text()
    assert "Traceback" not in page
    for claim in recipe.claims:
        assert claim.name in page


@pytest.mark.parametrize("name", NAMES)
def test_the_small_profile_is_complete(name: str) -> None:
    """Verdicts, seeds that can carry them, a cost, and a description of every claim.

    Catches: a profile whose claims can never be resolved; a claim without words.
    """
    recipe = nk.load_recipe(name, profile="small")
    assert recipe.verdicts
    assert recipe.seeds.count >= recipe.rules.min_pairs
    assert "minutes" in recipe.cost
    assert any(claim.primary for claim in recipe.claims) or name == "rank_correlation"
    assert all(claim.description for claim in recipe.claims)
    entry = next(entry for entry in experiments() if entry.name == name)
    words = (entry.path.parent / "README.md").read_text()
    for part in ("The claim.", "What it compares.", "Confounds."):
        assert part in words
