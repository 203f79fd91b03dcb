"""The page of networks and data sets says what the code has."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter

from noisekit.train.data.datasets import DataSpec
from noisekit.train.data.embedded import OwnData
from noisekit.train.losses import LOSSES
from noisekit.train.models import ModelSpec
from noisekit.train.models.build import OwnNetwork
from noisekit.train.recipes.run_spec import RunSections

PAGE = (Path(__file__).parents[2] / "docs" / "data_and_networks.md").read_text()
ROWS = re.findall(
    r"^\| `(\{ name = .*?\})` \| ([\dx]+) \| (\d+) \| ([\d,]+) \|", PAGE, re.MULTILINE
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_parameters_are_counted_right(row: tuple[str, str, str, str]) -> None:
    """Catches: a table that is left behind when a network changes."""
    settings, shape, classes, num_params = row
    table = tomllib.loads(f"model = {settings}")["model"]
    # Lists of TOML become tuples, as they do in a recipe.
    table = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    spec = TypeAdapter(ModelSpec).validate_python(table)
    with torch.device("meta"):
        model = spec.build(tuple(map(int, shape.split("x"))), int(classes))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,}" == num_params


def names_of(union: object, own: type) -> set[str]:
    """Names of the kinds of a section, without the user's own."""
    kinds = [get_args(member)[0] for member in get_args(get_args(union)[0])]
    return {
        name
        for kind in kinds
        if kind is not own
        for name in get_args(kind.model_fields["name"].annotation)
    }


def test_every_entry_is_on_the_page() -> None:
    """Catches: a network, data set or loss that is added to its table alone."""
    assert {row[0].split('"')[1] for row in ROWS} == names_of(ModelSpec, OwnNetwork)
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| .* \| .* \| .*\|$", PAGE, re.MULTILINE)
    assert names_of(DataSpec, OwnData) <= set(rows)
    for name in LOSSES:
        assert f"| `{name}` |" in PAGE


def test_recipes_on_the_page_are_valid() -> None:
    """Catches: a key that the page still has and the code not."""
    blocks = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    needed = {
        "data": {"name": "digits", "train": 32, "validation": 8, "test": 8},
        "model": {"name": "mlp"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "training": {"batch_size": 8, "stop": {"updates": 4}},
        "evaluation": {"every": {"updates": 4}},
    }
    assert len(blocks) == 2
    for block in blocks:
        table = tomllib.loads(block)
        merged = {**needed, **{k: {**needed.get(k, {}), **v} for k, v in table.items()}}
        RunSections.model_validate(merged, strict=False)
