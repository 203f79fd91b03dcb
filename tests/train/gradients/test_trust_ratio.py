"""LARS: against the formula, and against another library where both agree."""

import pytest
import pytorch_optimizer
import torch
from torch import nn

from noisekit.train.gradients.trust_ratio import TrustRatio
from noisekit.train.recipes.optimizers import Sgd


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_each_matrix_has_the_ratio_of_the_paper() -> None:
    """Weights by the formula; biases take the plain rate, with weight decay.

    Catches: a ratio over all layers; decay that is left out of the numerator's vector.
    """
    model = network()
    expected = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        g, w = parameter.grad.clone(), parameter.detach()
        ratio = 0.01 * w.norm() / (g.norm() + 0.3 * w.norm()) if w.dim() > 1 else 1.0
        expected[name] = ratio * (g + 0.3 * w)
    TrustRatio(0.01, 0.3).scale(model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("zero", ["weight", "gradient", "both"])
def test_zeros_leave_the_gradient_as_it_is(zero: str) -> None:
    """Catches: 0/0, or a layer of zeros that can never leave zero."""
    parameter = nn.Parameter(
        torch.zeros(2, 2) if zero != "gradient" else torch.ones(2, 2)
    )
    slope = torch.ones(2, 2) if zero == "weight" else torch.zeros(2, 2)
    parameter.grad = slope.clone()
    TrustRatio(0.01).scale([parameter])
    assert torch.equal(parameter.grad, slope)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_another_library_takes_the_same_steps(momentum, weight_decay) -> None:
    """pytorch-optimizer's LARS, ten steps, at a constant rate.

    It leaves vectors without weight decay, and ours does not, so that matrices alone
    are compared where there is decay; biases are frozen then.
    """
    ours, theirs = network(), network()
    if weight_decay:
        for model in (ours, theirs):
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.dim() > 1)
    spec = Sgd(
        learning_rate=2.0,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_ratio=0.02,
    )
    optimizer = spec.build([p for p in ours.parameters() if p.requires_grad])
    lars = pytorch_optimizer.LARS(
        [p for p in theirs.parameters() if p.requires_grad],
        lr=2.0,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=0.02,
    )
    inputs = torch.randn(8, 5, dtype=torch.float64)
    targets = torch.randint(2, (8,))
    for _ in range(10):
        for model, stepped in ((ours, optimizer), (theirs, lars)):
            stepped.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            if model is ours:
                spec.layer_scaling.scale(ours.parameters())
            stepped.step()
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_optimizer_leaves_the_decay_to_the_ratio() -> None:
    """Catches: weight decay that is applied twice."""
    weights = [nn.Parameter(torch.ones(2, 2))]
    group = Sgd(learning_rate=1.0, weight_decay=0.1, trust_ratio=0.01).build(weights)
    assert group.param_groups[0]["weight_decay"] == 0.0
    plain = Sgd(learning_rate=1.0, weight_decay=0.1)
    assert plain.build(weights).param_groups[0]["weight_decay"] == 0.1
    assert plain.layer_scaling is None
