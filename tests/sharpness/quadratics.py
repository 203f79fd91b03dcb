"""Losses whose sharpness is known, as functions of the weights alone."""

import torch
from torch import Tensor, nn

CURVATURES = torch.tensor([4.0, 1.0, 0.5, 1e-2, 1e-3], dtype=torch.float64)
MINIMIZER = torch.tensor([0.0, 2.0, -1.5, 0.3, -40.0], dtype=torch.float64)


class Point(nn.Module):
    """A model that is nothing but its weights: one row of them per example."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weights.expand(len(inputs), -1)


class Quadratic:
    """``offset + 1/2 (x - targets)' H (x - targets)``, averaged over examples."""

    def __init__(self, hessian: Tensor, offset: float = 0.3) -> None:
        self.hessian, self.offset = hessian, offset

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        gap = outputs - targets
        return self.offset + (gap @ self.hessian * gap).sum(1).mean() / 2


def at_rest(weights: Tensor, num_examples: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Data whose minimizer is ``weights``, in batches of unequal size."""
    rows = weights.expand(num_examples, -1)
    return [(rows[:1], rows[:1]), (rows[1:], rows[1:])]


def coupled(dims: int, seed: int) -> tuple[Tensor, Tensor]:
    """A positive definite matrix and a point, both random."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    point = torch.randn(dims, generator=generator, dtype=torch.float64)
    return root @ root.T / dims, point
