"""Recipes of the new sections: what fits together, and what is a fault."""

from pathlib import Path

import pytest

from noisekit.core.errors import RecipeError
from noisekit.train.recipes.loading import load_recipe

TINY = Path(__file__).parents[1] / "tiny.toml"
TEXT = TINY.read_text().replace("hidden = [4]", "").replace('"mlp"', '"MODEL"')
DIGITS = TEXT.replace('"gaussian"', '"digits"')


def written(folder: Path, text: str, model: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text.replace("MODEL", model))
    return path


@pytest.mark.parametrize(
    ("text", "model", "overrides", "message"),
    [
        (
            TEXT,
            "gpt",
            {},
            "model.name: 'gpt' reads tokens, which data.name = 'gaussian'",
        ),
        (
            TEXT,
            "mlp",
            {"data.name": "text"},
            "'mlp' reads real inputs, which data.name",
        ),
        (TEXT, "mlp", {"augment.flip": "true"}, r"augment: needs images .* \(20,\)"),
        (DIGITS, "c2", {}, "c2 needs images of at least 32x32, got 8x8"),
        (DIGITS, "mlp", {"data.pool": "3"}, "pool needs to divide"),
        (
            DIGITS,
            "mlp",
            {"training.label_smoothing": "1.0"},
            "a number below 1, got 1.0",
        ),
        (
            DIGITS,
            "mlp",
            {"training.loss": "squared_error", "training.label_smoothing": "0.1"},
            "label_smoothing belongs to loss = 'cross_entropy', got 'squared_error'",
        ),
        (DIGITS, "mlp", {"training.loss": "hinge"}, "half_squared_error"),
        (
            DIGITS,
            "mlp",
            {
                "training.terms": '[{ kind = "proximal", weight = 1.0 }, '
                '{ kind = "proximal", weight = 2.0 }]'
            },
            r"terms need different kinds, got \['proximal'\] twice",
        ),
        (DIGITS, "mlp", {"training.terms": '[{ kind = "entropy" }]'}, "adversarial"),
        (DIGITS, "mlp", {"training.clip_norm": "0.0"}, "a number above 0, got 0.0"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "keys",
)
def test_faults_name_the_key_and_the_way_out(
    text: str, model: str, overrides: dict, message: str, tmp_path: Path
) -> None:
    """Before anything runs."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text, model), overrides=overrides)


def test_adversarial_examples_of_tokens_are_a_fault(tmp_path: Path) -> None:
    """A token has no neighbors."""
    overrides = {
        "data.name": "text",
        "training.terms": '[{ kind = "adversarial", epsilon = 0.1 }]',
    }
    with pytest.raises(RecipeError, match=r"training.terms: .* has tokens; leave the"):
        load_recipe(written(tmp_path, TEXT, "gpt"), overrides=overrides)


def test_batch_norm_is_recognized_in_every_network(tmp_path: Path) -> None:
    """A probe of single examples is a fault where examples are coupled.

    Catches: recognizing BatchNorm by a network's name.
    """
    overrides = {"probe.every": "4", "probe.estimator": "per_example"}
    for model, keys, coupled in (
        ("resnet", {}, True),
        ("resnet", {"model.norm": "group"}, False),
        ("alexnet", {"model.norm": "batch_convolutions"}, True),
        ("alexnet", {}, False),
        ("c1", {}, True),
    ):
        path = written(tmp_path, DIGITS, model)
        if coupled:
            with pytest.raises(RecipeError, match="BatchNorm couples"):
                load_recipe(path, overrides={**overrides, **keys})
        else:
            load_recipe(path, overrides={**overrides, **keys})


def test_grid_over_losses_and_depths(tmp_path: Path) -> None:
    """Keys of the new sections are factors like any others.

    Catches: a loss that is recorded as a table; terms that a grid cannot name.
    """
    text = DIGITS.split("[[arms]]")[0] + (
        "[grid]\n"
        'training.loss = ["cross_entropy", "squared_error"]\n'
        "model.depth = [8, 14]\n"
        "optimizer.trust_ratio = [0.01]\n"
    )
    recipe = load_recipe(written(tmp_path, text, "resnet"), overrides={})
    specs = [spec for spec in recipe.run_specs() if spec.seed == 0]
    assert [(s.training.loss, s.model.depth) for s in specs] == [
        ("cross_entropy", 8),
        ("cross_entropy", 14),
        ("squared_error", 8),
        ("squared_error", 14),
    ]
    assert specs[0].factors["loss"] == "cross_entropy"
    again = type(specs[0]).from_json(specs[0].to_json())
    assert again == specs[0]
