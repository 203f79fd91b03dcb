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


@pytest.mark.parametrize(
    ("scaling", "size", "rate"),
    [
        ("none", 512, 0.1),
        ("linear", 512, 0.4),
        ("sqrt", 512, 0.2),
        ("linear", 32, 0.025),
    ],
)
def test_the_rate_follows_the_batch_size(scaling: str, size: int, rate: float) -> None:
    """Catches: the ratio upside down; a factor where none is asked for."""
    section: JsonValue = {"reference_batch": 128, "scaling": scaling}
    spec = run_spec(optimizer=section).optimizer
    assert spec.rate_at(size) == pytest.approx(rate, rel=1e-15)


def test_half_lives_in_examples_stay() -> None:
    """A policy's own power multiplies the ratio. Catches: one that replaces it."""
    section: dict[str, JsonValue] = {
        "name": "adam",
        "learning_rate": 0.1,
        "betas": [0.9, 0.999],
        "reference_batch": 64,
        "scale_betas": "both",
    }
    both = run_spec(optimizer=section).optimizer
    assert both.settings_at(64)["betas"] == (0.9, 0.999)
    assert both.settings_at(16)["betas"] == pytest.approx((0.9**0.25, 0.999**0.25))
    assert both.settings_at(16, 2.0)["betas"] == pytest.approx((0.9**0.5, 0.999**0.5))
    none = run_spec(optimizer={**section, "scale_betas": "none"}).optimizer
    assert none.settings_at(16, 2.0)["betas"] == pytest.approx((0.81, 0.999**2))
