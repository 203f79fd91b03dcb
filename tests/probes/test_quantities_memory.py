"""Memory that quantities take, counted allocation by allocation."""

import pytest
import torch
from torch import nn

from noisekit.core.vocabulary import QuantityName
from noisekit.integrations import attach
from tests.benchmarks.networks import NETWORKS
from tests.probes.test_memory import Way, peak_of_a_step, plain_peak

COPIES: dict[QuantityName, float] = {
    "norm_test": 0.0,
    "gradient_diversity": 0.0,
    "grad_histogram": 0.0,
    "cabs": 0.0,
    "gradient_cosine": 0.0,  # of two that are held from step to step
    "orthogonality_test": 0.35,  # zeros in the place of a layer's other parameters
    "update_size": 1.0,
    "distance_from_start": 1.0,
    "gsnr": 2.5,
    "hessian_noise_scale": 10.0,  # one of them the model that is replayed
}
"""Copies of the parameters that a step may hold at its peak beyond a plain step."""


@pytest.mark.parametrize("name", COPIES)
def test_a_step_holds_few_copies(name: QuantityName) -> None:
    """On a network of linear layers whose parameters are most of a step's memory.

    Catches: second moments of all examples at once, both halves' gradients held.
    """
    model = NETWORKS["M1"].build()
    gradient = sum(p.numel() * p.element_size() for p in model.parameters())
    way = Way(0.0, {"quantities": name, "hessian_every": 1, "num_chunks": 4})
    plain = plain_peak("M1", way)
    more = peak_of_a_step(NETWORKS["M1"], way) - plain
    assert more <= 0.01 * plain + COPIES[name] * gradient


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("gsnr", 0),
        ("update_size", 1),
        ("distance_from_start", 1),
        ("gradient_cosine", 2),
    ],
)
def test_what_is_held_between_steps(name: QuantityName, copies: int) -> None:
    """Catches: second moments that stay until the next forward pass."""
    model = nn.Linear(300, 300, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(8, 300)
    probe = attach(model, optimizer, quantities=name)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    (metric,), active = probe._metrics.metrics, probe._recorder.active
    assert active is not None
    lists = [value for value in vars(metric).values() if isinstance(value, list)]
    held = {id(t): t for tensors in lists for t in tensors if t.requires_grad is False}
    for kept in active.gathered.values():
        held |= {id(tensor): tensor for tensor in kept.values()}
    held = [*held.values()]
    assert sum(tensor.numel() for tensor in held) == copies * model.weight.numel()
