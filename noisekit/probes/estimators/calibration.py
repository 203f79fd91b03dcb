"""What the normalisation layers' noise stands for: a scale found by full readings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Calibration:
    """The ratio of the whole model's ``tr Σ`` to that of its normalisation layers.

    A ratio of sums over the full readings so far; sums stay on their device.

    Attributes:
        num_readings: Full readings behind the ratio.
    """

    def __init__(self) -> None:
        self.num_readings = 0
        self._whole: Tensor | float = 0.0
        self._part: Tensor | float = 0.0

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Count a full reading in: ``tr Σ`` of the model and of its norm layers."""
        self._whole, self._part = self._whole + whole, self._part + part
        self.num_readings += 1

    @property
    def ratio(self) -> Tensor | float:
        """What ``tr Σ`` of the normalisation layers is to be multiplied by."""
        return self._whole / self._part

    def state_dict(self) -> dict[str, float]:
        """Return the sums as numbers."""
        return {
            "num_readings": self.num_readings,
            "whole": float(self._whole),
            "part": float(self._part),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # read from a file
        """Go on where the calibration that gave ``state`` was."""
        self.num_readings = int(state["num_readings"])
        self._whole = torch.tensor(float(state["whole"]))
        self._part = torch.tensor(float(state["part"]))
