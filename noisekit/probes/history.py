"""The readings that a probe keeps, and their average."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import pandas as pd
import torch

from noisekit.noise.moments import GradientMoments
from noisekit.noise.scale import NoiseParts, NoiseScale, ratio_of_averages
from noisekit.probes.host_copy import on_its_way
from noisekit.probes.reading import Reading

MAX_READINGS = 10_000


Sink = Callable[[Reading], object]


class Pending(Protocol):
    """A reading that waits for the device, and does so only when looked at."""

    def resolved(self) -> Reading | None:
        """Return the reading; ``None`` if there turns out to be none."""


class ReadingHistory:
    """The last readings of a probe, each handed to the sinks as it comes.

    Attributes:
        num_taken: Readings so far, those no longer kept included.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.num_taken = 0
        self._sinks = tuple(sinks)
        self._kept: deque[Reading | Pending] = deque(maxlen=MAX_READINGS)

    def add(self, reading: Reading | Pending) -> None:
        """Keep a reading and pass it on; sinks do not take pending ones."""
        self.num_taken += 1
        found = reading
        if self._sinks and not isinstance(reading, Reading):
            resolved = reading.resolved()
            if resolved is None:
                return
            found = resolved
        if isinstance(found, Reading):
            for sink in self._sinks:
                sink(found)
            found = on_its_way(found)
        self._kept.append(found)

    def add_sink(self, sink: Sink) -> None:
        """Have ``sink`` called with every reading from now on."""
        self._sinks = (*self._sinks, sink)

    def kept(self) -> list[Reading]:
        """The last readings, oldest first."""
        found = [r if isinstance(r, Reading) else r.resolved() for r in self._kept]
        readings = [reading for reading in found if reading is not None]
        self._kept = deque(readings, maxlen=self._kept.maxlen)
        return readings

    def frame(self) -> pd.DataFrame:
        """Return the readings as a table, one row per step."""
        return pd.DataFrame([reading.row() for reading in self.kept()])

    def noise_scale(
        self,
        *,
        window: int | None,
        estimator: str | None,
        population_size: int | None,
    ) -> NoiseScale | None:
        """Return what the last ``window`` readings say together, with its parts.

        Counted in tokens, a step's ``tr Σ`` is that of one token, and it weighs by its
        tokens: with sequences ``i`` of ``t_i`` tokens over all steps, the average is
        ``sum t_i² v_i / sum t_i``, which is right whatever their lengths.
        """
        readings = self.kept()[-window if window else None :]
        found = [
            (_weight_of(reading), _counted(reading, part))
            for reading in readings
            for moments in (_moments_of(reading, estimator),)
            if moments is not None and _is_counted(reading)
            for part in (moments.parts(population_size=population_size),)
            if part is not None
        ]
        if len(found) < 2:
            return found[0][1].noise_scale() if found else None
        sizes, parts = zip(*found, strict=True)
        return ratio_of_averages(
            torch.tensor([p.variance_trace for p in parts], dtype=torch.float64),
            torch.tensor([p.debiased_grad_sq_norm for p in parts], dtype=torch.float64),
            weights=torch.tensor(sizes, dtype=torch.float64),
        )


def _is_counted(reading: Reading) -> bool:
    return reading.unit != "token" or reading.tokens is not None


def _counted(reading: Reading, parts: NoiseParts) -> NoiseParts:
    """The parts as they enter the ratio, per token where that is the unit."""
    tokens = reading.tokens
    return parts if tokens is None else parts.scaled(tokens.per_sequence)


def _weight_of(reading: Reading) -> float:
    """What a step counts in an average over steps."""
    tokens = reading.tokens
    return float(reading.batch_size) if tokens is None else tokens.total


def _moments_of(reading: Reading, estimator: str | None) -> GradientMoments | None:
    return reading.moments if estimator is None else reading.estimates.get(estimator)
