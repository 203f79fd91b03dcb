"""Squared norms and inner products of tensors as large as a language model's tables."""

import pytest
import torch
from torch import Tensor

from noisekit.core.reductions import inner_product, row_sq_norms, sq_norms
from noisekit.integrations import attach

LARGE = 40_000_003
EXACT = 3e-6
"""float32's own accuracy: some 20 units in the last place."""


def exact(a: Tensor, b: Tensor) -> float:
    """``<a, b>`` in float64, a piece at a time."""
    pairs = zip(a.flatten().split(2**20), b.flatten().split(2**20), strict=True)
    return sum(float((x.double() * y.double()).sum()) for x, y in pairs)


@pytest.fixture(scope="module")
def large() -> Tensor:
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(0))


def test_large_tensors_keep_seven_digits(large: Tensor) -> None:
    """Catches: one kernel call for all, which is 6e-3 low here; a remainder lost."""
    wanted = exact(large, large)
    assert float(sq_norms([large])[0]) == pytest.approx(wanted, rel=EXACT)
    assert float(row_sq_norms(large[None])[0]) == pytest.approx(wanted, rel=EXACT)
    shifted = large.roll(1).add_(large)
    products = exact(large, shifted)
    assert float(inner_product(large, shifted)) == pytest.approx(products, rel=EXACT)


@pytest.mark.parametrize("size", [1, 2**16 + 1, 2**17, 2**17 + 1, 600_000])
def test_sizes_about_the_limits(size: int) -> None:
    """Catches: pieces that are counted twice, or not at all, at a limit's edge."""
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    wanted = [exact(row, row) for row in values]
    assert sq_norms(list(values)).tolist() == pytest.approx(wanted, rel=EXACT)
    assert row_sq_norms(values).tolist() == pytest.approx(wanted, rel=EXACT)


def test_order_layout_and_emptiness_do_not_matter() -> None:
    """Catches: small tensors moved in front of large ones; a view that must copy."""
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randn(n, generator=generator) for n in (5, 300_000))
    turned = large.reshape(600, 500).T
    norms = sq_norms([small, turned, torch.zeros(0), large, small])
    wanted = [exact(t, t) for t in (small, large, torch.zeros(0), large, small)]
    assert norms.tolist() == pytest.approx(wanted, rel=EXACT)
    assert sq_norms([large.double()]).dtype == torch.float64


def test_a_probe_reads_a_large_gradient_to_seven_digits() -> None:
    """A table of 4 M entries whose gradient is known.

    Catches: ``|g|²`` of a large parameter read low by 1e-4.
    """
    model = torch.nn.Linear(4_000_000, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inputs = torch.randn(1, 4_000_000, generator=torch.Generator().manual_seed(0))
    with attach(model, optimizer) as probe:
        model(inputs).sum().backward()
        optimizer.step()
    wanted = exact(inputs, inputs)
    assert probe.readings[0].grad_sq_norm.value == pytest.approx(wanted, rel=EXACT)
