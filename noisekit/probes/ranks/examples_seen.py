"""How many examples training has seen, on this rank or on all; the sum over ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.distributed import sum_over_ranks
from noisekit.probes.capture.replicas import Replicas
from noisekit.probes.capture.step_weights import Number
from noisekit.probes.ranks.sums import RankPart, RankSums
from noisekit.probes.reading import Reading
from noisekit.probes.step_result import StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingReading:
    """A reading that waits for values on the device until somebody looks at it.

    Attributes:
        result: This rank's.
        sums: Of all ranks' vectors, where there are several.
        layout: How they lie in the vector.
        examples_seen: By all ranks, this step included.
        mean_over_active: Whether ranks without inputs are left out of the average.
        found_inf: Whether the optimizer has skipped the step, where only the device
            knows.
    """

    result: StepResult
    sums: Tensor | None = None
    layout: RankSums | None = None
    examples_seen: int | Tensor = 0
    mean_over_active: bool = False
    found_inf: Tensor | None = None

    def resolved(self) -> Reading | None:
        """Return the reading; ``None`` if the step was skipped."""
        if self.found_inf is not None and bool(self.found_inf):
            return None
        if self.sums is None or self.layout is None:
            return self.result.reading()
        whole = self.layout.whole(
            self.result,
            self.sums,
            examples_seen=int(self.examples_seen),
            mean_over_active=self.mean_over_active,
        )
        return whole.reading()


class ExamplesSeen:
    """Counts examples; other ranks' counts come with the sums of each reading.

    Until then other ranks are taken to have seen as many as this one.
    """

    def __init__(
        self, replicas: Replicas, layout: RankSums, device: torch.device
    ) -> None:
        self._replicas = replicas
        self._layout = layout
        self._device = device
        self._before: int | Tensor = 0
        self._since = 0

    def add(self, num_examples: int) -> None:
        """Count this rank's examples of one step."""
        self._since += num_examples

    @property
    def total(self) -> int:
        """Examples that entered a gradient, on any rank."""
        self._before = int(self._before)
        return self._before + self._replicas.ranks.size * self._since

    def restart(self, total: int) -> None:
        """Go on from a count that was saved."""
        self._before, self._since = total, 0

    def summed(
        self,
        local: StepResult | None,
        *,
        count: Number = 0.0,
        found_inf: Tensor | None = None,
    ) -> PendingReading | None:
        """Sum over ranks, in one all-reduce that each of them takes part in.

        Args:
            local: This rank's result; ``None`` where it has no part in the step.
            count: What its examples count together in a loss that is a sum.
            found_inf: Whether the step was skipped, where only the device knows.
        """
        layout = self._layout
        own = layout.absent(self._device)
        if local is not None:
            own = layout.packed(RankPart(local, self._since, count))
        sums = sum_over_ranks(own, self._replicas.ranks)
        self._before, self._since = self._before + layout.num_seen(sums), 0
        if local is None:
            return None
        return PendingReading(
            result=local,
            sums=sums,
            layout=layout,
            examples_seen=self._before,
            mean_over_active=self._replicas.mean_over_active(),
            found_inf=found_inf,
        )
