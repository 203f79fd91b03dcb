"""What a batch policy is told of the last update."""

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from noisekit.core.vocabulary import QuantityName
from noisekit.policies import Need, quantities_for, values_of_reading
from noisekit.probes import Probe
from noisekit.train.recipes.policy_section import OF_READINGS
from noisekit.train.recipes.update_plan import PlannedUpdate


class Observations:
    """Gathers, for the batch policies of a run, what they need.

    A value of a reading is waited for on the device: one transfer an update.

    Attributes:
        quantities: Step metrics that the probe has to compute for them.
        evaluations: Whether they look at evaluations.
    """

    def __init__(self, needs: Sequence[Need], *, adaptive: bool) -> None:
        self._names = tuple(sorted({need.name for need in needs}))
        self._intervals = [
            need.every.updates or 1 for need in needs if need.name in OF_READINGS
        ]
        self._adaptive = adaptive
        metrics = quantities_for(self._names)
        self.quantities = cast("tuple[QuantityName, ...]", metrics)
        self.evaluations = "evaluation_loss" in self._names

    def readings_every(self, every: int) -> int:
        """Return the updates from one reading to the next; 0 means never.

        Args:
            every: What the recipe asks for.
        """
        return math.gcd(every, *self._intervals)

    def of(
        self, planned: PlannedUpdate, batch_loss: Tensor, probe: Probe | None
    ) -> dict[str, Any]:
        """Return what was observed in an update, as JSON."""
        if not self._adaptive:
            return {}
        seen: dict[str, Any] = {
            "batch_size": planned.num_examples,
            "learning_rate": planned.learning_rate,
        }
        loss = None
        if "loss" in self._names or self.quantities:
            loss = float(batch_loss)
        if "loss" in self._names:
            seen["loss"] = loss
        if probe is not None and self._intervals:
            seen |= values_of_reading(
                probe, self._names, loss=loss, learning_rate=planned.learning_rate
            )
        return seen
