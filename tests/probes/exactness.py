"""Readings of a few steps, and what they must agree with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.integrations import attach
from noisekit.probes import Reading
from tests.reference import noise as reference


def data(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, shape[:1], generator=generator)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return build().double()


def readings_of(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, steps: int = 3
) -> list[Reading]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return probe.readings


def expected_now(
    model: nn.Module, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """With buffers as they are; evaluation mode neither reads nor writes others."""
    model.eval()
    grads = reference.contributions(model, functional.cross_entropy, (inputs,), targets)
    return {name: len(inputs) * rows for name, rows in grads.items()}


def assert_agree(reading: Reading, expected: dict[str, Tensor], rtol: float) -> None:
    """Every example in total, and every layer's noise and gradient, agree."""
    assert reading.coverage.reason is None
    assert reading.example_sq_norms is not None
    total = sum(norms for norms in reference.sq_norms(expected).values())
    torch.testing.assert_close(
        reading.example_sq_norms.double(),
        total,
        rtol=rtol,
        atol=rtol * float(total.max()),
    )
    assert [layer.name for layer in reading.layers] == list(expected)
    # What rounding may leave of a gradient that is zero, such as an unused layer's.
    dust = 1e-3 * rtol * float(total.sum())
    for layer, rows in zip(reading.layers, expected.values(), strict=True):
        trace = reference.variance_trace([rows])
        assert layer.variance_trace.value == pytest.approx(trace, rel=rtol, abs=dust)
        norm = float(rows.mean(0).square().sum())
        assert layer.grad_sq_norm.value == pytest.approx(norm, rel=rtol, abs=dust)
