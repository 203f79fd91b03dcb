"""Claims of a recipe: stated, checked against the arms, recorded and read again."""

from pathlib import Path

import pytest

from noisekit.core.errors import RecipeError
from noisekit.stats import BestDifference, claim_of
from noisekit.train import Recipe, load_recipe

RECIPE = """
format = 2
name = "grid"
question = "Which rate is best?"
[data]
name = "gaussian"
train = 32
validation = 8
test = 8
[model]
name = "mlp"
hidden = [4]
[optimizer]
name = "sgd"
learning_rate = 0.1
[training]
batch_size = 8
stop = { updates = 12 }
[evaluation]
every = { updates = 4 }
[seeds]
count = 2
[[arms]]
name = "plain"
[arms.grid]
training.batch_size = [4, 8]
optimizer.learning_rate = [0.1, 0.2, 0.4]
[[claims]]
name = "small_beats_large"
statistic = { name = "best_difference", quantity = "test_error", over = "learning_rate", treatment = "plain/batch_size=8", reference = "plain/batch_size=4" }
margin = 0.005
primary = true
expect = "larger"
account = "sharp_minima"
paper = "figure 15"
"""  # noqa: E501


def loaded(tmp_path: Path, *changes: tuple[str, str]) -> Recipe:
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path)


def test_a_claim_reaches_the_statistics_and_comes_back_from_its_record(
    tmp_path: Path,
) -> None:
    """Catches: a field that is lost on the way; a claim that no record gives back."""
    recipe = loaded(tmp_path)
    (claim,) = recipe.stated_claims()
    assert isinstance(claim.statistic, BestDifference)
    assert (claim.primary, claim.expect, claim.account) == (
        True,
        "larger",
        "sharp_minima",
    )
    assert Recipe.from_json(recipe.to_json()) == recipe
    recorded = recipe.model_dump(mode="json")["claims"][0]
    assert claim_of(recorded) == claim


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'name = "best_difference"',
            'name = "best_diference"',
            "claims[1]: name needs to be one of difference, ratio",
        ),
        ('over = "learning_rate"', 'ovr = "a"', "claims[1]: ovr is no setting of"),
        (
            'over = "learning_rate"',
            'over = "momentum"',
            "claims.small_beats_large.statistic.over: needs a factor that the arms",
        ),
        (
            "plain/batch_size=8",
            "plain/batch_size=9",
            "claims.small_beats_large.statistic.treatment: needs an arm",
        ),
        (
            'quantity = "test_error"',
            'quantity = "lambda_max"',
            "'lambda_max' is not measured at 'final'",
        ),
        (
            'over = "learning_rate"',
            'select = "test_error"',
            "a level chosen on test data is no fair comparison",
        ),
        (
            'over = "learning_rate"',
            'at = "loss_0.1"',
            "claims.small_beats_large.statistic.at: needs a snapshot",
        ),
        ("primary = true", 'primary = true\nkind = "control"', "needs primary = false"),
        ("margin = 0.005", "margin = 0.005\nscale = 'log'", "claims[1].scale: needs"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused_before_any_run(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    """Catches: a misspelt group, factor or setting that shows after hours of runs."""
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, (old, new))
    assert said in str(caught.value)


def test_whether_there_are_verdicts_is_no_list_of_claims(tmp_path: Path) -> None:
    """Catches: ``claims = true`` of older recipes taken for no claims at all."""
    with pytest.raises(RecipeError, match="claims: is the list of claims, got true"):
        loaded(tmp_path, ('name = "grid"', 'name = "grid"\nclaims = true'), *_ALONE)


_ALONE = ((RECIPE[RECIPE.index("[[claims]]") :], ""),)


def test_an_own_statistic_is_code_of_the_recipe_s_own(tmp_path: Path) -> None:
    """Catches: a user's function that is imported without leave, or not named."""
    start = RECIPE.index("statistic = ")
    line = RECIPE[start : RECIPE.index("\n", start)]
    own = 'statistic = { name = "mymodule:gap", treatment = "plain", power = 2 }'
    recipe = loaded(tmp_path, (line, own))
    assert "mymodule:gap" in recipe.named_code
    (claim,) = recipe.stated_claims()
    assert claim.statistic.words() == "mymodule:gap"


def test_a_record_with_claims_as_a_truth_value_is_read(tmp_path: Path) -> None:
    """Catches: runs of last month that no longer report."""
    table = loaded(tmp_path, *_ALONE).model_dump(mode="json")
    del table["verdicts"]
    assert not Recipe.from_table({**table, "claims": False}).verdicts
    assert Recipe.from_table({**table, "claims": True}).verdicts
