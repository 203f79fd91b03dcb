"""The readings that a probe keeps, and their average."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import pandas as pd
import torch
from torch import Tensor

from noisekit.core.results import Estimate, Status
from noisekit.noise.scale import NoiseParts, ratio_of_averages
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

    def last(self) -> Reading | None:
        """The latest reading; waits for no other."""
        while self._kept:
            found = self._kept.pop()
            reading = found if isinstance(found, Reading) else found.resolved()
            if reading is not None:
                self._kept.append(reading)
                return reading
        return None

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
    ) -> Estimate:
        """Return the simple noise scale over the last ``window`` readings.

        A ratio of averages over readings that cover the same parameters, all of them
        where there are such; those that are not finite are left out, and counted.

        Counted in tokens, a step's ``tr Σ`` is that of one token, and it weighs by its
        tokens: with sequences ``i`` of ``t_i`` tokens over all steps, the average is
        ``sum t_i² v_i / sum t_i``, which is right whatever their lengths.
        """
        readings = self.kept()[-window if window else None :]
        samples = [
            _Sample(reading, parts)
            for reading in readings
            for parts in (_parts_of(reading, estimator, population_size),)
            if parts is not None
        ]
        finite = [sample for sample in samples if sample.parts.finite]
        chosen = _alike(finite)
        note = _left_out(len(samples), len(finite), chosen)
        if not chosen:
            note = note or _why_none(readings, estimator)
            return Estimate(math.nan, status=Status.UNAVAILABLE, note=note)
        if len(chosen) == 1:
            noise = chosen[0].counted.noise_scale()
        else:
            parts = [sample.counted for sample in chosen]
            noise = ratio_of_averages(
                _vector(part.variance_trace for part in parts),
                _vector(part.debiased_grad_sq_norm for part in parts),
                weights=_vector(sample.weight for sample in chosen),
            )
        return replace(noise.simple_noise_scale, note=note or None)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A reading and the parts of its noise scale, in examples."""

    reading: Reading
    parts: NoiseParts

    @property
    def weight(self) -> float:
        """What the step counts in an average over steps."""
        tokens = self.reading.tokens
        return float(self.reading.batch_size) if tokens is None else tokens.total

    @property
    def counted(self) -> NoiseParts:
        """The parts as they enter the ratio, per token where that is the unit."""
        tokens = self.reading.tokens
        return self.parts if tokens is None else self.parts.scaled(tokens.per_sequence)

    @property
    def unread(self) -> frozenset[str]:
        """Parameters that the noise does not cover."""
        return frozenset(self.reading.coverage.unread)


def _parts_of(
    reading: Reading, estimator: str | None, population_size: int | None
) -> NoiseParts | None:
    """The parts of a reading's noise scale, where it has one."""
    if reading.unit == "token" and reading.tokens is None:
        return None
    moments = reading.moments
    if estimator is not None:
        moments = reading.estimates.get(estimator)
    return None if moments is None else moments.parts(population_size=population_size)


def _alike(samples: Sequence[_Sample]) -> list[_Sample]:
    """Those that cover all parameters, or else the same ones as the last."""
    whole = [sample for sample in samples if not sample.unread]
    if whole or not samples:
        return whole
    return [sample for sample in samples if sample.unread == samples[-1].unread]


def _left_out(num_samples: int, num_finite: int, chosen: Sequence[_Sample]) -> str:
    """What does not count in an average, and which parameters it covers."""
    notes = []
    if num_finite < num_samples:
        lost = num_samples - num_finite
        notes.append(f"{lost} of {num_samples} readings left out: not finite")
    if chosen and len(chosen) < num_finite:
        others = num_finite - len(chosen)
        notes.append(f"{others} left out that cover other parameters")
    if chosen and chosen[-1].unread:
        notes.append(str(chosen[-1].reading.coverage))
    return "; ".join(notes)


def _why_none(readings: Sequence[Reading], estimator: str | None) -> str:
    """Why no reading has a noise scale."""
    if not readings:
        return "no step was read"
    coverage = readings[-1].coverage
    for name in (estimator or "", "tokens"):
        if name in coverage.missing:
            return coverage.missing[name]
    return coverage.why_missing or "noise needs 2 units in a step"


def _vector(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
