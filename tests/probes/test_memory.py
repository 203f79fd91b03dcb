"""Memory that reading takes, counted allocation by allocation against a plain step."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from noisekit.integrations import attach
from tests.benchmarks.networks import NETWORKS, Network

SGD, ADAM = torch.optim.SGD, torch.optim.Adam


@dataclass(frozen=True)
class Way:
    """A way to read.

    Attributes:
        share: What it may hold beyond a plain step, in units of that step's peak.
        options: Of ``attach``.
        copies: What it may hold besides, in units of the gradient.
        kind: Of the optimizer.
        num_parts: Micro-batches of a step.
    """

    share: float
    options: dict[str, Any]
    copies: float = 0.0
    kind: type[torch.optim.Optimizer] = SGD
    num_parts: int = 1


WAYS = {
    "per_example": Way(0.15, {"estimator": "per_example"}),
    "replace": Way(0.15, {"exact_bits": False}),
    "rows": Way(0.15, {"estimator": "rows"}),
    "chunks": Way(0.15, {"estimator": "chunks"}),
    "norm_layers": Way(0.01, {"estimator": "norm_layers"}),
    "side_by_side": Way(0.15, {"estimator": ("auto", "rows", "chunks")}),
    # Gradients of a later micro-batch, which are dropped in portions.
    "accumulation": Way(0.05, {"estimator": "accumulation"}, 0.75, num_parts=2),
    # A replay of half of the batch on a copy of the model, while the graph of the whole
    # is held; a gradient of one replay, and their sum.
    "ghost": Way(0.55, {"estimator": "ghost"}, 3.0),
    # The graph is kept for a second pass, which has a gradient of its own.
    "random_signs": Way(0.3, {"estimator": "random_signs"}),
    # What the optimizer multiplies each gradient by, and one layer's squares.
    "preconditioned": Way(
        0.15, {"estimator": ("per_example", "preconditioned")}, 1.4, kind=ADAM
    ),
}
"""What each way to read may hold at its peak beyond a plain step."""

_plain: dict[tuple[str, type, int], int] = {}


def peak_of_a_step(network: Network, way: Way, *, reads: bool = True) -> int:
    """Most bytes that a step holds at a time beyond what was held before it.

    What the tensor allocator hands out is counted, so that the number is the same on
    every run; gradients are allocated anew in each step, activations as well.
    """
    model, inputs, targets = network.made()
    count = len(inputs) // 4
    parts = list(
        zip(*(t[:count].chunk(way.num_parts) for t in (inputs, targets)), strict=True)
    )
    optimizer = way.kind(model.parameters(), lr=1e-3)
    loss_fn: Callable[[Tensor, Tensor], Tensor] = network.loss_fn()
    if reads:
        options = dict(way.options)
        if options.get("estimator") == "ghost":
            options["ghost_batch"] = count // 2
        loss_fn = attach(model, optimizer, loss_fn=loss_fn, **options).loss_fn

    def step() -> None:
        optimizer.zero_grad()
        for x, y in parts:
            (loss_fn(model(x), y) / len(parts)).backward()
        optimizer.step()

    for _ in range(5):  # beyond the checks of the first readings
        step()
    optimizer.zero_grad()
    gc.collect()  # else what earlier tests have left may be given back within the step
    gc.disable()
    try:
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True
        ) as recorded:
            step()
    finally:
        gc.enable()
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    return peak


def plain_peak(name: str, way: Way) -> int:
    """The same of a step without a probe."""
    key = (name, way.kind, way.num_parts)
    if key not in _plain:
        _plain[key] = peak_of_a_step(NETWORKS[name], way, reads=False)
    return _plain[key]


@pytest.mark.parametrize("name", ["M1", "M2", "M4"])
@pytest.mark.parametrize("key", WAYS)
def test_peak_memory_stays_near_a_plain_step(name: str, key: str) -> None:
    """Catches: per-example gradients of a whole layer, or activations kept too long."""
    way, model = WAYS[key], NETWORKS[name].build()
    gradient = sum(p.numel() * p.element_size() for p in model.parameters())
    plain = plain_peak(name, way)
    more = peak_of_a_step(NETWORKS[name], way) - plain
    assert more <= way.share * plain + way.copies * gradient


def test_activations_are_given_back_while_the_backward_pass_runs() -> None:
    """A deep network holds its activations until their layers are read, no longer.

    Catches: calls that are released when the whole backward pass ends.
    """
    layers = [nn.Linear(16, 16, bias=False) for _ in range(20)]
    model = nn.Sequential(*layers)
    network = Network("deep", lambda: model, lambda: torch.randn(128, 16), 16)
    way = WAYS["per_example"]
    plain = peak_of_a_step(network, way, reads=False)
    assert peak_of_a_step(network, way) <= 1.05 * plain
