"""The boxes in which epsilon-sharpness is maximised: full space, random subspace."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream

_BLOCK_ENTRIES = 2**24
"""Entries of the random columns that are made at a time (64 MiB in float32)."""


class Box(ABC):
    """Displacements ``A y`` of the weights with ``|y_i| <= radius_i``.

    Attributes:
        radius: Half the box's width in each coordinate of ``y``.
    """

    radius: Tensor

    @abstractmethod
    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return ``A y``, the change of the weights."""

    @abstractmethod
    def gradient(self, grad: Tensor) -> Tensor:
        """Return ``A' g``, the gradient in the box's own coordinates."""

    def random_point(self, generator: torch.Generator) -> Tensor:
        """Return a point that is uniform in the box."""
        uniform = torch.rand(
            self.radius.shape, generator=generator, device=generator.device
        )
        return (2 * uniform - 1).to(self.radius) * self.radius

    def random_corner(self, generator: torch.Generator) -> Tensor:
        """Return one of the box's vertices, each as likely as another."""
        bits = torch.randint(
            0, 2, self.radius.shape, generator=generator, device=generator.device
        )
        return (2 * bits - 1).to(self.radius) * self.radius


class FullSpace(Box):
    """Every weight moves by at most ``epsilon (|x_i| + 1)``; ``A`` is the identity."""

    def __init__(self, origin: Tensor, epsilon: float) -> None:
        self.radius = epsilon * (origin.abs() + 1)

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return the coordinates themselves."""
        return coordinates

    def gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient itself."""
        return grad


class RandomSubspace(Box):
    """Weights move in the span of random columns, ``|y_i| <= epsilon (|(A⁺x)_i| + 1)``.

    The columns' entries are standard normal. Their scale is part of the measure: with
    columns of unit norm it would be smaller by about the number of parameters.

    The columns are made in blocks of rows, each from its own seed, and are kept where
    they fit into ``memory_budget`` bytes; else each product makes them again. They are
    made on the CPU in single precision, so that a model has the same subspace on
    every device and in every precision.
    """

    def __init__(
        self,
        origin: Tensor,
        epsilon: float,
        *,
        num_dims: int,
        seed: int,
        memory_budget: int = 2**30,
    ) -> None:
        if not 1 <= num_dims <= origin.numel():
            raise UsageError(
                f"subspace_dim needs to be from 1 to the {origin.numel()} parameters, "
                f"got {num_dims}; leave it out to search the full space."
            )
        self._origin = origin
        self._num_dims = num_dims
        self._seed = seed
        self._rows = max(1, _BLOCK_ENTRIES // num_dims)
        fits = origin.numel() * num_dims * origin.element_size() <= memory_budget
        self._kept = list(self._make_blocks()) if fits else None
        projected = _least_squares(self._blocks(), origin, num_dims)
        self.radius = (epsilon * (projected.abs() + 1)).to(origin)

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return ``A y``."""
        return torch.cat([block @ coordinates for _, block in self._blocks()])

    def gradient(self, grad: Tensor) -> Tensor:
        """Return ``A' g``, summed over blocks in double precision."""
        total = torch.zeros(self._num_dims, dtype=torch.float64, device=grad.device)
        for rows, block in self._blocks():
            total += (block.T @ grad[rows]).double()
        return total.to(grad)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return self._make_blocks() if self._kept is None else iter(self._kept)

    def _make_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self._origin.numel(), self._rows):
            stop = min(start + self._rows, self._origin.numel())
            block = torch.randn(
                stop - start,
                self._num_dims,
                generator=stream(self._seed, "columns", start // self._rows),
                dtype=torch.float32,
            )
            yield slice(start, stop), block.to(self._origin)


def _least_squares(
    blocks: Iterator[tuple[slice, Tensor]], origin: Tensor, num_dims: int
) -> Tensor:
    """Return ``A⁺x`` in double precision, from the normal equations.

    Random columns are nearly orthogonal unless they are almost as many as the rows, so
    that squaring their condition number is harmless in double precision.
    """
    gram = torch.zeros(num_dims, num_dims, dtype=torch.float64, device=origin.device)
    moment = torch.zeros_like(gram[0])
    for rows, block in blocks:
        wide = block.double()
        gram += wide.T @ wide
        moment += wide.T @ origin[rows].double()
    solution: Tensor = torch.linalg.solve(gram, moment)
    return solution
