"""What comes with noisekit, and the recipe to start from."""

from pathlib import Path

import pytest

from noisekit.core.errors import RecipeError, UsageError
from noisekit.train.recipes import catalogue
from noisekit.train.recipes.loading import load_recipe


def test_experiments_have_question_and_costs() -> None:
    """Whoever lists the experiments reads what each asks and what it costs."""
    (entry,) = [e for e in catalogue.experiments() if e.name == "small_vs_large_batch"]
    assert entry.question.endswith("?")
    profiles = {profile.name: profile for profile in entry.profiles}
    assert {"smoke", "demo", "tuning", "standard", "paper"} <= set(profiles)
    assert all(profile.title and profile.cost for profile in entry.profiles)


def test_recipe_analyses_exist() -> None:
    """A recipe asks for no analysis that does not come with it.

    Catches: an analysis that was renamed on one side only.
    """
    known = {entry.name for entry in catalogue.analyses()}
    for entry in catalogue.experiments():
        for profile in entry.profiles:
            recipe = load_recipe(entry.path, profile=profile.name)
            assert set(recipe.analyses) <= known


def test_question_of_an_analysis_is_read_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line of the docstring is the question; nothing is executed.

    Catches: importing the scripts to list them.
    """
    (tmp_path / "analyses").mkdir()
    script = '"""Is it sharp?\n\nMore words.\n"""\nraise SystemExit("was run")\n'
    (tmp_path / "analyses" / "sharp.py").write_text(script)
    (tmp_path / "analyses" / "_shared.py").write_text(script)
    monkeypatch.setattr(catalogue, "_PACKAGE", tmp_path / "noisekit")
    (entry,) = catalogue.analyses()
    assert (entry.name, entry.question) == ("sharp", "Is it sharp?")
    assert catalogue.find_analysis("sharp") == entry.path
    with pytest.raises(UsageError, match="an analysis, one of 'sharp', got 'shrap'"):
        catalogue.find_analysis("shrap")


def test_wheel_goes_before_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package finds its own files, whatever lies beside it.

    Catches: taking ``site-packages/experiments`` of somebody else.
    """
    monkeypatch.setattr(catalogue, "_PACKAGE", tmp_path / "noisekit")
    with pytest.raises(RecipeError, match=r"found neither .*install noisekit again"):
        catalogue.bundled("experiments")
    (tmp_path / "experiments").mkdir()
    assert catalogue.bundled("experiments") == tmp_path / "experiments"
    inside = tmp_path / "noisekit" / "_bundled" / "experiments"
    inside.mkdir(parents=True)
    assert catalogue.bundled("experiments") == inside


def test_new_recipe_loads_as_it_is(tmp_path: Path) -> None:
    """What ``new`` writes is a sound recipe, in each profile.

    Catches: a starting point that fails its own checks.
    """
    path = catalogue.write_starter_recipe(tmp_path / "mine")
    assert path == tmp_path / "mine" / "recipe.toml"
    recipe = load_recipe(tmp_path / "mine")
    assert [spec.arm for spec in recipe.run_specs()[:2]] == ["small", "large"]
    assert not load_recipe(path, profile="smoke").claims
    comments = [line for line in path.read_text().splitlines() if "#" in line]
    assert len(comments) > 10


def test_new_never_overwrites(tmp_path: Path) -> None:
    """A recipe that is there stays as it is."""
    (tmp_path / "recipe.toml").write_text("mine")
    with pytest.raises(UsageError, match=r"needs a folder without a recipe, got .*rec"):
        catalogue.write_starter_recipe(tmp_path)
    assert (tmp_path / "recipe.toml").read_text() == "mine"
