"""Every bundled experiment runs at its smoke profile, and its page is written."""

from pathlib import Path

import pytest

import noisekit as nk
from noisekit.cli.pipeline import write_report
from noisekit.report.comparability import judged_claims, sample_of
from noisekit.stats import Verdict
from noisekit.train.recipes.catalogue import bundled, experiments

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
    assert any(claim.primary for claim in recipe.claims)
    assert all(claim.description for claim in recipe.claims)
    entry = next(entry for entry in experiments() if entry.name == name)
    words = (entry.path.parent / "README.md").read_text()
    for part in ("The claim.", "What it compares.", "Confounds."):
        assert part in words


def test_a_policy_at_its_bound_is_not_comparable(tmp_path: Path) -> None:
    """CABS never leaves its published smallest batch, 16, on so small a network.

    Catches: a claim about an adaptive batch that was constant all along.
    """
    text = (bundled("experiments") / "cabs/recipe.toml").read_text()
    text = text.replace('name = "cabs", min = 4, max = 512', 'name = "cabs", max = 512')
    path = tmp_path / "recipe.toml"
    path.write_text(
        text.replace("coupled/learning_rate=0.4", "coupled/learning_rate=0.2")
    )
    overrides = {"seeds.count": "2", "rules.min_pairs": "2"}
    recipe = nk.load_recipe(path, profile="smoke", overrides=overrides)
    runs = nk.run(recipe, tmp_path / "set", workers=0)
    (claim,) = recipe.stated_claims()
    reason = sample_of(runs, claim).not_comparable
    assert reason is not None
    assert (
        "held the batch size at a bound (16 or 512) in 100 % of the updates" in reason
    )
