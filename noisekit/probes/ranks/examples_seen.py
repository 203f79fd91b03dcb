"""How many examples training has seen, on this rank or on all; sums that bring it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.distributed import sum_over_ranks
from noisekit.probes.capture.replicas import Replicas
from noisekit.probes.capture.step_weights import Number
from noisekit.probes.ranks.rank_payload import StepParts
from noisekit.probes.ranks.sums import RankPart, RankSums
from noisekit.probes.reading import Reading


@dataclass(frozen=True, slots=True)
class SummedReading:
    """A reading of all ranks, whose sums are still on their device.

    Attributes:
        part: This rank's.
        sums: Of all ranks' vectors.
        layout: How they lie in the vector.
        examples_seen: By all ranks, this step included.
        mean_over_active: Whether ranks without inputs are left out of the average.
    """

    part: RankPart
    sums: Tensor
    layout: RankSums
    examples_seen: int | Tensor
    mean_over_active: bool

    def parts(self) -> StepParts | None:
        """Return what quantities take of all ranks' examples, if there are such."""
        own = self.part.parts
        if own is None:
            return None
        return self.layout.parts(own, self.sums, mean_over_active=self.mean_over_active)

    def resolved(self) -> Reading:
        """Return the reading, now that somebody asks for it."""
        return self.layout.reading(
            self.part,
            self.sums,
            examples_seen=int(self.examples_seen),
            mean_over_active=self.mean_over_active,
        )


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
        local: Reading | None,
        *,
        count: Number = 0.0,
        parts: StepParts | None = None,
    ) -> SummedReading | None:
        """Sum over ranks, in one all-reduce that each of them takes part in.

        Args:
            local: This rank's reading; ``None`` where it has no part in the step.
            count: What its examples count together in a loss that is a sum.
            parts: What the quantities beside the noise take of its examples.
        """
        layout, part = self._layout, None
        if local is not None:
            part = RankPart(local, self._since, count, parts)
        own = layout.absent(self._device) if part is None else layout.packed(part)
        sums = sum_over_ranks(own, self._replicas.ranks)
        self._before, self._since = self._before + layout.num_seen(sums), 0
        if part is None:
            return None
        mean_over_active = self._replicas.mean_over_active()
        return SummedReading(part, sums, layout, self._before, mean_over_active)
