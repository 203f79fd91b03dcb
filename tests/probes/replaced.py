"""A network whose gradients are replaced, trained with and without."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.integrations import attach
from noisekit.probes import Reading


class ConvNet(nn.Module):
    """Every kind of layer whose gradient is replaced, and some whose is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)
        self.wide = nn.Conv2d(6, 16, 3, padding="same", padding_mode="circular")
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.positions = nn.Linear(36, 5)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)), inplace=True)
        x = functional.relu(self.grouped(x), inplace=True)
        x = functional.relu(self.up(torch.tanh(self.wide(x))), inplace=True)
        logits: Tensor = self.head(torch.tanh(self.positions(x.flatten(2))).flatten(1))
        return logits


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(model(inputs), targets)


def data(dtype: torch.dtype = torch.float64, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 2, 7, 7, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(3, (6,), generator=generator)


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return ConvNet().to(dtype)


Run = Callable[[nn.Module, torch.optim.Optimizer], None]


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    loss_of(model, *data(dtype)).backward()
    optimizer.step()


def ran(
    model: nn.Module, run: Run, **options: Any
) -> tuple[dict[str, Tensor], list[Reading]]:
    """Gradients and readings of a copy of ``model`` that ``run`` has trained."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    readings: list[Reading] = []
    if options:
        with attach(own, optimizer, **options) as probe:
            run(own, optimizer)
        readings = probe.readings
    else:
        run(own, optimizer)
    named = own.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}, readings


def assert_like_plain(model: nn.Module, run: Run, **options: Any) -> None:
    """Gradients as without a probe, readings as with one that keeps the bits."""
    plain, _ = ran(model, run)
    _, wanted = ran(model, run, exact_bits=True, **options)
    grads, got = ran(model, run, exact_bits=False, **options)
    assert grads.keys() == plain.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain[name])
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.coverage.reason == other.coverage.reason
        assert float(one.variance_trace.value) == pytest.approx(
            float(other.variance_trace.value), rel=1e-6, nan_ok=True
        )


def same_bits(model: nn.Module, run: Run) -> bool:
    plain, _ = ran(model, run)
    grads, _ = ran(model, run, exact_bits=False)
    return all(torch.equal(grad, plain[name]) for name, grad in grads.items())
