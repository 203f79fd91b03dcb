"""Rates and betas set in optimizers: rules, schedulers, resumes, refusals."""

import copy
import math

import pytest
import torch

import noisekit as nk


def optimizer_of(kind="SGD", groups=1, **options):
    settings = {"lr": 0.1} | options
    weights = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": settings["lr"] / 2**k}
        for k in range(groups)
    ]
    return getattr(torch.optim, kind)(weights, **settings)


def test_factor_is_on_the_base_rate():
    """Catches: factors that pile up from call to call."""
    optimizer = optimizer_of(groups=2)
    for factor in (0.75, 0.75, 0.5625, 1.0):
        found = nk.apply_rate(optimizer, nk.Decision(8, rate_factor=factor))
        assert found == [0.1 * factor, 0.05 * factor]
        assert [group["lr"] for group in optimizer.param_groups] == found


def test_customary_rules():
    """Linear for SGD, square root for Adam; refused for others unless stated.

    Catches: the linear rule on the start batch (8 / 8) in place of the present one.
    """
    rule = nk.RateRule(reference_batch=8)
    decision = nk.Decision(32)
    assert nk.apply_rate(optimizer_of("SGD"), decision, rule=rule) == [0.4]
    for kind in ("Adam", "AdamW"):
        assert nk.apply_rate(optimizer_of(kind), decision, rule=rule) == [0.2]
    for kind in ("RMSprop", "Adagrad", "NAdam"):
        with pytest.raises(nk.NoisekitError, match=f"got {kind}, for which no rule"):
            nk.apply_rate(optimizer_of(kind), decision, rule=rule)
    stated = nk.RateRule(reference_batch=8, scaling="sqrt")
    assert nk.apply_rate(optimizer_of("RMSprop"), decision, rule=stated) == [0.2]
    with pytest.raises(nk.NoisekitError, match="needs an optimizer; use for_optimizer"):
        rule.applied(decision)


def test_half_life_of_betas_in_examples():
    """Beta ** (m / m0): after as many examples an average has decayed as far."""
    optimizer = optimizer_of("Adam", betas=(0.9, 0.999))
    rule = nk.RateRule(reference_batch=64, scaling="none", half_life=True)
    for size in (16, 256, 64):
        nk.apply_rate(optimizer, nk.Decision(size), rule=rule)
        for beta, base in zip(
            optimizer.param_groups[0]["betas"], (0.9, 0.999), strict=True
        ):
            examples = size * math.log(0.5) / math.log(beta)
            assert examples == pytest.approx(64 * math.log(0.5) / math.log(base))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    with pytest.raises(
        nk.NoisekitError, match="needs an optimizer with betas, got SGD"
    ):
        nk.apply_rate(optimizer_of(), nk.Decision(128), rule=rule)


def test_rate_in_a_tensor_stays_one():
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.Adam([torch.ones(1, requires_grad=True)], lr=rate)
    nk.apply_rate(optimizer, nk.Decision(8, rate_factor=0.5))
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.05


def test_resume_keeps_the_base():
    """Catches: a base taken anew from an optimizer whose rate was already scaled."""
    optimizer = optimizer_of()
    nk.apply_rate(optimizer, nk.Decision(8, rate_factor=0.25))
    resumed = optimizer_of(lr=9.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert nk.apply_rate(resumed, nk.Decision(8, rate_factor=0.5)) == [0.05]


def test_schedulers_are_noticed():
    optimizer = optimizer_of()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    nk.apply_rate(optimizer, nk.Decision(8, rate_factor=0.5))
    optimizer.step()
    schedule.step()
    with pytest.raises(nk.NoisekitError, match=r"got lr=0.025 in group 0 .* set 0.05"):
        nk.apply_rate(optimizer, nk.Decision(8, rate_factor=0.5))
    decision = nk.Decision(8, rate_factor=0.5)
    assert nk.apply_rate(optimizer, decision, base=0.2) == [0.1]
    assert nk.apply_rate(optimizer, decision, base=[0.4]) == [0.2]
    with pytest.raises(nk.NoisekitError, match="one rate per param group"):
        nk.apply_rate(optimizer, decision, base=[0.1, 0.2])
