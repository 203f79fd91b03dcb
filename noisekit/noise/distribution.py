"""How gradient norms are distributed: a histogram that grows with the run."""

import math
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from noisekit.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class LogHistogram:
    """Counts in bins of equal ratio; mergeable, of bounded size, on any device.

    Every value falls into a bin: zeros, and values outside the edges, are counted in
    the two outer bins. Quantiles are exact up to one bin's ratio.

    Attributes:
        low: First edge; positive.
        high: Last edge.
        counts: ``(bins + 2,)``: below, the bins, above.
        num_invalid: Values that were not finite or negative; in no bin.
    """

    low: float
    high: float
    counts: Tensor = field(repr=False)
    num_invalid: Tensor = field(repr=False)

    @classmethod
    def empty(
        cls,
        *,
        low: float = 1e-12,
        high: float = 1e12,
        num_bins: int = 960,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return a histogram without values; by default 40 bins a decade.

        Raises:
            UsageError: If the edges are not ``0 < low < high`` or there is no bin.
        """
        if not (0 < low < high < math.inf and num_bins >= 1):
            raise UsageError(
                "a histogram needs 0 < low < high and a bin, got "
                f"low={low}, high={high}, num_bins={num_bins}."
            )
        counts = torch.zeros(num_bins + 2, dtype=torch.int64, device=device)
        return cls(low, high, counts, counts.new_zeros(()))

    @property
    def bin_ratio(self) -> float:
        """Upper over lower edge of each bin."""
        return float((self.high / self.low) ** (1 / (len(self.counts) - 2)))

    @property
    def edges(self) -> Tensor:
        """Edges of the bins between ``low`` and ``high``."""
        return torch.logspace(
            math.log10(self.low),
            math.log10(self.high),
            len(self.counts) - 1,
            dtype=torch.float64,
        )

    def add(self, values: Tensor) -> Self:
        """Return the histogram with ``values`` added, without synchronization."""
        values = values.detach().flatten()
        valid = values.isfinite() & (values >= 0)
        wide = torch.promote_types(values.dtype, torch.float32)
        place = (values.to(wide).log() - math.log(self.low)) / math.log(self.bin_ratio)
        index = (place.floor() + 1).clamp(0, len(self.counts) - 1)
        # An index computed from NaN would be out of range; it adds nothing.
        index = torch.where(valid, index, 0.0).long()
        counts = self.counts.scatter_add(0, index, valid.to(self.counts.dtype))
        return replace(
            self, counts=counts, num_invalid=self.num_invalid + (~valid).sum()
        )

    def merge(self, other: "LogHistogram") -> Self:
        """Return the histogram of both's values.

        Raises:
            UsageError: If their bins differ.
        """
        mine = (self.low, self.high, len(self.counts))
        theirs = (other.low, other.high, len(other.counts))
        if mine != theirs:
            raise UsageError(
                f"histograms need the same bins to be merged, got {mine} and {theirs} "
                "(low, high, number of counts)."
            )
        return replace(
            self,
            counts=self.counts + other.counts,
            num_invalid=self.num_invalid + other.num_invalid,
        )

    def quantile(self, share: float) -> float:
        """Return the value below which ``share`` of all values lie; NaN if none.

        Zero or ``inf`` where that value lies below the first or above the last edge.

        Raises:
            UsageError: If ``share`` is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise UsageError(f"a quantile needs a share in [0, 1], got {share}.")
        counts = self.counts.double().cpu()
        total = float(counts.sum())
        if total == 0:
            return math.nan
        cumulative = counts.cumsum(0)
        rank = max(share * total, 0.5)
        index = int(torch.searchsorted(cumulative, torch.tensor(rank).double()))
        if index == 0:
            return 0.0
        if index == len(counts) - 1:
            return math.inf
        before = float(cumulative[index - 1])
        inside = (rank - before) / float(counts[index])
        return float(self.low * self.bin_ratio ** (index - 1 + inside))

    def __str__(self) -> str:
        """Write how many values there are, their median and middle nine tenths."""
        low, middle, high = (self.quantile(share) for share in (0.05, 0.5, 0.95))
        return (
            f"{int(self.counts.sum())} values, median {middle:.3g}, nine in ten from "
            f"{low:.3g} to {high:.3g}; {int(self.num_invalid)} invalid"
        )
