"""The stream of examples that batches are cut from, and places in it."""

from dataclasses import dataclass
from typing import Literal

from noisekit.core.batch_order import BatchOrder
from noisekit.core.distributed import Ranks
from noisekit.core.errors import UsageError

EpochEnd = Literal["run_on", "ragged", "drop"]
_EPOCH_ENDS: tuple[EpochEnd, ...] = ("run_on", "ragged", "drop")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an update begins.

    Attributes:
        updates: Updates before it.
        examples: Examples that entered those.
        cursor: Examples of the stream before it, dropped ones included.
    """

    updates: int = 0
    examples: int = 0
    cursor: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """A batch: ``count`` examples from ``begin``; the next one begins at ``end``."""

    begin: int
    count: int
    end: int

    def after(self, place: Place) -> Place:
        """Return where the next update begins."""
        return Place(place.updates + 1, place.examples + self.count, self.end)


class ExampleStream:
    """One permutation of the examples after the other, cut into batches.

    Attributes:
        num_examples: Examples of a pass.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        seed: int,
        shuffle: bool,
        epoch_end: EpochEnd,
        ranks: Ranks,
    ) -> None:
        if epoch_end not in _EPOCH_ENDS:
            raise UsageError(
                f"epoch_end needs to be one of {', '.join(_EPOCH_ENDS)}, got "
                f"{epoch_end!r}."
            )
        if num_examples < ranks.size:
            raise UsageError(
                f"a sampler needs an example per process, got {num_examples} examples "
                f"for {ranks.size} processes."
            )
        self.num_examples = num_examples
        self._shuffle, self._epoch_end, self._ranks = shuffle, epoch_end, ranks
        self._order = BatchOrder(seed, num_examples=num_examples, device="cpu")

    def pass_end(self, cursor: int) -> int:
        """Return where the pass that ``cursor`` is in ends."""
        return (cursor // self.num_examples + 1) * self.num_examples

    def cut(self, cursor: int, size: int) -> Cut | None:
        """Return a batch of ``size`` examples; ``None`` if the rest is left out."""
        left = self.num_examples - cursor % self.num_examples
        if self._epoch_end == "run_on" or size <= left:
            return Cut(cursor, size, cursor + size)
        # All processes need shares of one size: DDP weighs their gradients equally.
        count = left // self._ranks.size * self._ranks.size
        if self._epoch_end == "drop" or count == 0:
            return None
        return Cut(cursor, count, cursor + left)

    def indices(self, cut: Cut) -> list[int]:
        """Return this process's share of a batch, as indices of the data set."""
        first, step = cut.begin + self._ranks.rank, self._ranks.size
        if not self._shuffle:
            places = range(first, cut.begin + cut.count, step)
            return [place % self.num_examples for place in places]
        rows: list[int] = self._order.indices(cut.begin, cut.count).tolist()
        return rows[self._ranks.rank :: step]
