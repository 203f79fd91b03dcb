"""Named vectors laid out in one, so that one all-reduce sums all of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.probes.capture.step_weights import Number

Part = Number | tuple[Number, ...]
"""A tensor, a number, or several numbers."""


@dataclass(frozen=True, slots=True)
class VectorLayout:
    """How named parts lie in a vector; the same on every rank.

    Attributes:
        sizes: Elements of each part, in their order.
    """

    sizes: Mapping[str, int]

    def packed(self, parts: Mapping[str, Part], device: torch.device) -> Tensor:
        """Return the parts as one vector in float64; zeros for those that are absent.

        Nothing is copied from the host, which would wait for the device.
        """
        return torch.cat(
            [
                _vector(parts[name], device)
                if name in parts
                else torch.zeros(size, dtype=torch.float64, device=device)
                for name, size in self.sizes.items()
            ]
        )

    def unpacked(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parts of a vector, by name."""
        parts = torch.split(vector, list(self.sizes.values()))
        return dict(zip(self.sizes, parts, strict=True))


def _vector(part: Part, device: torch.device) -> Tensor:
    if isinstance(part, tuple):
        return torch.cat([_vector(value, device) for value in part])
    if isinstance(part, Tensor):
        return part.detach().double().reshape(-1)
    return torch.full((1,), part, dtype=torch.float64, device=device)
