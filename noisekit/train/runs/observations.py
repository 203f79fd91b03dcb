"""What a batch policy is told of the last update."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from noisekit.policies import Need
from noisekit.probes import Reading
from noisekit.train.recipes.update_plan import PlannedUpdate

_READ: Mapping[str, Callable[[Reading], float]] = MappingProxyType(
    {
        "variance_trace": lambda reading: reading.variance_trace.value,
        "grad_sq_norm": lambda reading: reading.grad_sq_norm.value,
        "debiased_grad_sq_norm": lambda reading: reading.debiased_grad_sq_norm.value,
    }
)
"""What a reading of the probe gives, by field of ``policies.Observation``."""


class Observations:
    """Gathers, for the batch policies of a run, what they need.

    A value of a reading is waited for on the device: one transfer an update.
    """

    def __init__(self, needs: Sequence[Need], *, adaptive: bool) -> None:
        self._names = {need.name for need in needs}
        self._intervals = [
            need.every.updates or 1 for need in needs if need.name in _READ
        ]
        self._adaptive = adaptive
        self._reading: Reading | None = None

    @property
    def evaluations(self) -> bool:
        """Whether evaluations are needed."""
        return "evaluation_loss" in self._names

    @property
    def sinks(self) -> tuple[Callable[[Reading], object], ...]:
        """What the probe calls with its readings."""
        return (self._take,) if self._intervals else ()

    def readings_every(self, every: int) -> int:
        """Return the updates from one reading to the next; 0 means never.

        Args:
            every: What the recipe asks for.
        """
        return math.gcd(every, *self._intervals)

    def of(self, planned: PlannedUpdate, batch_loss: Tensor) -> dict[str, Any]:
        """Return what was observed in an update, as JSON."""
        if not self._adaptive:
            return {}
        seen: dict[str, Any] = {
            "batch_size": planned.num_examples,
            "learning_rate": planned.learning_rate,
        }
        if "loss" in self._names:
            seen["loss"] = float(batch_loss)
        reading, self._reading = self._reading, None
        if reading is not None:
            seen |= {
                name: read(reading)
                for name, read in _READ.items()
                if name in self._names
            }
        return seen

    def _take(self, reading: Reading) -> None:
        self._reading = reading
