"""Attaching changes nothing of a model that writes to all that it holds."""

import random
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import ProbeWarning
from noisekit.integrations import attach
from tests.probes.stateful import CORES

ESTIMATORS: dict[str, dict[str, Any]] = {
    "auto": {},
    "per_example": {"estimator": "per_example"},
    "rows": {"estimator": "rows"},
    "chunks": {"estimator": "chunks", "num_chunks": 2},
    "accumulation": {"estimator": "accumulation"},
    "random_signs": {"estimator": "random_signs"},
    "norm_layers": {"estimator": "norm_layers"},
    "ghost": {"estimator": "ghost", "ghost_batch": 4},
    "preconditioned": {"estimator": ("auto", "preconditioned")},
    "measured": {"measured": True},
    "hessian": {"quantities": ("hessian_noise_scale",), "num_chunks": 3},
}


def frozen_state(value: Any) -> Any:
    """All that an object holds, by value, so that two can be compared with ``==``."""
    for kinds, by_value in _BY_VALUE:
        if isinstance(value, kinds):
            return by_value(value)
    if hasattr(value, "__dict__") and not callable(value):
        return frozen_state(vars(value))
    return str(value) if callable(value) else value


def _of_module(module: nn.Module) -> Any:
    own = {n: v for n, v in vars(module).items() if "hooks" not in n}
    return type(module).__name__, frozen_state(own)


_BY_VALUE: list[tuple[Any, Callable[[Any], Any]]] = [
    (Tensor, lambda t: (t.detach().double().flatten().tolist(), t.requires_grad)),
    (nn.Module, _of_module),
    (dict, lambda d: {str(name): frozen_state(v) for name, v in d.items()}),
    ((list, tuple, deque, set), lambda c: [frozen_state(entry) for entry in c]),
    (torch.Generator, lambda g: g.get_state().tolist()),
    (np.random.Generator, lambda g: str(g.bit_generator.state)),
    (random.Random, random.Random.getstate),
]


def trained(
    build: Callable[[], nn.Module], options: dict[str, Any] | None, *, breaks: bool
) -> Any:
    """State of model, optimizer and generators after a few steps."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    model = nn.Sequential(nn.Linear(6, 6), build(), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=0.05
    )
    loss_fn = nn.CrossEntropyLoss()
    given = dict(options or {})
    measured = given.pop("measured", False)
    probe = None
    if options is not None:
        probe = attach(model, optimizer, loss_fn=loss_fn, **given)
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(8) % 3
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)) if step == 1 else (slice(0, 8),):
            loss = loss_fn(model(inputs[part]), targets[part])
            loss.backward()
        if breaks and step == 1:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model(inputs[:, :2])
        if probe is not None and measured:
            probe.measure(inputs, targets)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert probe is None or probe.step == 3
    return (
        losses,
        frozen_state(model),
        frozen_state(list(optimizer.state.values())),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    )


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("build", CORES, ids=lambda core: core.__name__)
def test_all_state_is_what_it_is_without_a_probe(
    build: Callable[[], nn.Module], name: str
) -> None:
    """Weights, gradients, and every attribute of every module, compared by value.

    Catches: a run, a replay or a ghost batch on the user's own model; a copy that
    shares parameters, generators, queues or closures of hooks with it; a replay that
    leaves other tensors in a module of two names.
    """
    plain = trained(build, None, breaks=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProbeWarning)
        probed = trained(build, ESTIMATORS[name], breaks=False)
    assert plain == probed


@pytest.mark.parametrize("build", CORES, ids=lambda core: core.__name__)
def test_nothing_is_left_behind_by_an_exception(build: Callable[[], nn.Module]) -> None:
    """Catches: replaced tensors and counters after a forward pass that broke off."""
    plain = trained(build, None, breaks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProbeWarning)
        probed = trained(build, {"exact_bits": True}, breaks=True)
    assert plain == probed
