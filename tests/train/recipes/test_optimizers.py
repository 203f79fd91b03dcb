"""Optimizers as stated by a recipe."""

import pytest
import torch
from pydantic import JsonValue
from torch import nn

from tests.train.run_specs import run_spec


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ({"name": "adam", "betas": [0.8, 0.9], "eps": 1e-6}, torch.optim.Adam),
        ({"name": "adamw", "weight_decay": 0.1}, torch.optim.AdamW),
    ],
)
def test_the_recipe_reaches_the_optimizer(
    section: dict[str, JsonValue], kind: type[torch.optim.Optimizer]
) -> None:
    """Catches: settings that are read and never used; Adam in place of AdamW."""
    spec = run_spec(optimizer=section).optimizer
    made = spec.build(nn.Linear(2, 2).parameters())
    assert type(made) is kind
    group = made.param_groups[0]
    assert group["lr"] == 0.1
    for key, value in section.items():
        if key != "name":
            wanted = tuple(value) if isinstance(value, list) else value
            assert group[key] == wanted
