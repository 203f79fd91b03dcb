"""Stability thresholds against PyTorch's own optimizer in one dimension."""

import pytest
import torch
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate
from noisekit.sharpness.measures.stability import (
    SGDRule,
    edge_of_stability_ratio,
    stability_threshold,
)
from tests.reference.sharpness import spectral_radius_of_sgd

RULES = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.5},
    *({"lr": 0.02, "momentum": beta} for beta in (0.3, 0.9, 0.99)),
    {"lr": 0.02, "momentum": 0.9, "dampening": 0.9},
    {"lr": 0.02, "momentum": 0.5, "dampening": 0.2, "weight_decay": 1.0},
    *(
        {"lr": 0.02, "momentum": beta, "nesterov": True}
        for beta in (0.1, 0.5, 0.9, 0.99)
    ),
]


@pytest.mark.parametrize("options", RULES, ids=str)
def test_threshold_is_where_the_optimizer_itself_starts_to_grow(options: dict) -> None:
    """Just below it the companion matrix of SGD contracts, just above it grows.

    Catches: the threshold of averaged momentum, ``v = beta v + (1 - beta) g``;
    dampening or weight decay left out; Nesterov with the heavy ball's bound.
    """
    limit = stability_threshold(SGDRule(**options))
    assert spectral_radius_of_sgd(limit * (1 - 1e-6), **options) < 1
    assert spectral_radius_of_sgd(limit * (1 + 1e-6), **options) > 1


@pytest.mark.parametrize(
    ("options", "full", "small"),
    [
        ({}, 500, 500),
        ({"momentum": 0.9}, 950, 50),
        ({"momentum": 0.9, "nesterov": True}, 950 / 2.8, 50),
    ],
)
def test_published_plateaus(options: dict, full: float, small: float) -> None:
    """The three plateaus at a rate of 0.004, for both kinds of batches.

    Catches: ``1 + beta`` and ``1 - beta`` exchanged.
    """
    rule = SGDRule(lr=0.004, **options)
    assert stability_threshold(rule) == pytest.approx(full)
    assert stability_threshold(rule, kind="small_batch") == pytest.approx(small)


def test_small_batches_see_the_effective_rate() -> None:
    """``2 / lr_eff`` with ``lr_eff = lr (1 - dampening) / (1 - momentum)``.

    Catches: dampening left out, which is what turns one convention into the other.
    """
    rule = SGDRule(lr=0.1, momentum=0.9, dampening=0.9)
    assert stability_threshold(rule, kind="small_batch") == pytest.approx(2 / 0.1)


def test_rule_is_read_off_the_optimizer() -> None:
    """Catches: defaults in place of the groups' own values."""
    options = {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], **options)
    assert SGDRule.of(optimizer) == SGDRule(**options)
    expected = 2 * 1.8 / (2.6 * 0.3) - 0.1
    assert stability_threshold(optimizer) == pytest.approx(expected)
    # Without momentum PyTorch ignores dampening.
    plain = torch.optim.SGD([weight], lr=0.3, dampening=0.5)
    assert stability_threshold(plain) == pytest.approx(2 / 0.3)


def test_ratio_carries_the_errors_of_the_curvature() -> None:
    """At the edge it is 1, with the bound in the same units.

    Catches: a bound that is still in units of curvature.
    """
    top = Estimate(30.0, bound=0.3, error_source=ErrorSource.SOLVER, num_matvecs=9)
    got = edge_of_stability_ratio(top, SGDRule(lr=0.1, momentum=0.5))
    assert got.value == pytest.approx(1.0)
    assert got.bound == pytest.approx(0.01)
    assert got.num_matvecs == 9
    small = Estimate(10.0, stderr=1.0, error_source=ErrorSource.DATA)
    got = edge_of_stability_ratio(
        small, SGDRule(lr=0.1, momentum=0.5), kind="small_batch"
    )
    assert got.value == pytest.approx(1.0)
    assert got.stderr == pytest.approx(0.1)


def test_rules_without_a_threshold_are_refused() -> None:
    """Catches: Adam's step size taken for a learning rate of SGD."""
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(UsageError, match=r"torch\.optim\.SGD, got Adam, whose steps"):
        stability_threshold(torch.optim.Adam([one]))
    groups = [{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.2}]
    with pytest.raises(UsageError, match="got 2 different parameter groups"):
        stability_threshold(torch.optim.SGD(groups))
    with pytest.raises(UsageError, match="minimized, got maximize"):
        stability_threshold(torch.optim.SGD([one], lr=0.1, maximize=True))
    with pytest.raises(UsageError, match="'full_batch' or 'small_batch', got 'both'"):
        stability_threshold(SGDRule(lr=0.1), kind="both")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr needs to be positive and finite, got 0.0"),
        (
            {"lr": 0.1, "momentum": 1.0},
            "momentum needs to be below 1, got 1.0",
        ),
        ({"lr": 0.1, "nesterov": True}, "nesterov needs momentum above 0"),
    ],
)
def test_impossible_rules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SGDRule(**options)
