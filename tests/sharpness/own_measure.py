"""A measure as a user writes one, in a file of their own."""

from collections.abc import Iterator
from dataclasses import dataclass

from noisekit.core.results import Estimate
from noisekit.core.settings import PositiveInt
from noisekit.sharpness import Measure, Measurement, MeasurementContext


@dataclass(frozen=True, kw_only=True)
class LargestWeight(Measure):
    """The largest absolute weight, to a power."""

    name = "largest_weight"
    description = "the largest absolute weight"
    in_variant = ("power",)

    power: PositiveInt = 1

    def cost(self) -> int:
        return 0

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        largest = float(context.risk.vector().abs().max())
        yield self.measured(Estimate(largest**self.power))


NOT_A_MEASURE = "text"
