"""Learning rates and optimisers as stated by a recipe."""

import math

import pytest
import torch
from pydantic import JsonValue
from torch import nn

from noisekit.train.runs.optimizers import build_optimizer, learning_rate_at
from tests.train.run_specs import run_spec


def rates(schedule: dict[str, JsonValue], updates: list[int]) -> list[float]:
    spec = run_spec(
        optimizer={"learning_rate": 2.0},
        schedule=schedule,
        training={"stop": {"updates": 100}},
    )
    return [learning_rate_at(spec, update) for update in updates]


def test_constant() -> None:
    """Catches: a schedule where none is asked for."""
    assert rates({"name": "constant"}, [0, 50, 99]) == [2.0, 2.0, 2.0]


def test_warmup_rises_to_the_rate_and_stays() -> None:
    """Catches: a first update at rate zero; one update too many of warm-up."""
    found = rates({"name": "constant", "warmup_updates": 4}, [0, 1, 2, 3, 4])
    assert found == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_steps_at_fractions_and_at_updates() -> None:
    """Catches: fractions read as updates; a milestone one update late."""
    schedule: dict[str, JsonValue] = {
        "name": "step",
        "milestones": [0.5, 80],
        "gamma": 0.5,
    }
    assert rates(schedule, [49, 50, 79, 80]) == [2.0, 1.0, 1.0, 0.5]


def test_cosine_falls_from_the_rate_to_zero() -> None:
    """Catches: a cosine over the wrong length, or that begins during warm-up."""
    schedule: dict[str, JsonValue] = {"name": "cosine", "warmup_updates": 20}
    found = rates(schedule, [20, 60, 99, 100])
    last = 1 + math.cos(math.pi * 79 / 80)
    assert found == pytest.approx([2.0, 1.0, last, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ({"name": "adam", "betas": [0.8, 0.9], "eps": 1e-6}, torch.optim.Adam),
        ({"name": "adamw", "weight_decay": 0.1}, torch.optim.AdamW),
    ],
)
def test_the_recipe_reaches_the_optimiser(
    section: dict[str, JsonValue], kind: type[torch.optim.Optimizer]
) -> None:
    """Catches: settings that are read and never used; Adam in place of AdamW."""
    spec = run_spec(optimizer=section).optimizer
    made = build_optimizer(spec, nn.Linear(2, 2).parameters())
    assert type(made) is kind
    group = made.param_groups[0]
    assert group["lr"] == 0.1
    for key, value in section.items():
        if key != "name":
            wanted = tuple(value) if isinstance(value, list) else value
            assert group[key] == wanted
