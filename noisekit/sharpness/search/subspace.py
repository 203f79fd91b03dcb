"""A box in the span of random columns, in which epsilon-sharpness is maximized."""

from collections.abc import Iterator

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream
from noisekit.sharpness.search.regions import Box

_BLOCK_ENTRIES = 2**24
"""Entries of the random columns that are generated at a time (64 MiB in float32)."""


class RandomSubspace(Box):
    """Weights move in the span of random columns, ``|y_i| <= epsilon (|(A⁺x)_i| + 1)``.

    The columns' entries are standard normal. Their scale is part of the measure: with
    columns of unit norm it would be smaller by about the number of parameters.

    The columns are generated in blocks of rows, each from its own seed, and are cached
    where they fit into ``memory_budget`` bytes; else each product generates them again.
    They are generated on the CPU in single precision, so that a model has the same
    subspace on every device and in every precision.
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
        super().__init__((epsilon * (projected.abs() + 1)).to(origin))

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
