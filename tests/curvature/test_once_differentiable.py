"""Kernels with a first derivative only, behind which autograd says nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from noisekit.core.errors import UsageError
from noisekit.curvature import FisherOperator, GGNOperator, HessianOperator


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:  # autograd's own context
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return 2 * inputs * grad


class OnceOnly(nn.Module):
    """A kernel between two layers, as somebody's own extension would be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply all three."""
        hidden: Tensor = _Squared.apply(self.first(inputs))
        return self.last(hidden)


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, FisherOperator])
@pytest.mark.parametrize("budget", [0, 2**30])
def test_products_are_refused_and_not_zero(
    operator: type[HessianOperator] | type[GGNOperator] | type[FisherOperator],
    budget: int,
) -> None:
    """Catches: a block of zeros for every layer below the kernel."""
    torch.manual_seed(0)
    data = [(torch.randn(6, 4), torch.randint(0, 3, (6,)))]
    model, loss_fn = OnceOnly(), nn.CrossEntropyLoss()
    matrix = operator(model, loss_fn, data, memory_budget=budget or 1)
    with pytest.raises(UsageError, match="a derivative that is not differentiable"):
        matrix @ torch.randn(matrix.shape[0])


def test_finite_differences_are_the_way_out() -> None:
    """The message's own advice works."""
    torch.manual_seed(0)
    data = [(torch.randn(6, 4), torch.randint(0, 3, (6,)))]
    model, loss_fn = OnceOnly(), nn.CrossEntropyLoss()
    matrix = HessianOperator(model, loss_fn, data, form="finite_difference")

    plain = nn.Sequential(model.first, _Square(), model.last)
    expected = HessianOperator(plain, loss_fn, data)
    vector = torch.randn(matrix.shape[0])
    torch.testing.assert_close(matrix @ vector, expected @ vector, rtol=1e-3, atol=1e-4)


class _Square(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.square()
