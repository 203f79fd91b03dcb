"""What a step has left for the estimators, and what one of them says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.step_record import ForwardPass, StepRecord
from noisekit.probes.capture.step_weights import Number, StepWeights
from noisekit.probes.estimators.calibration import Calibration
from noisekit.probes.estimators.choice import EstimatorOptions


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a step has left for the estimators.

    Attributes:
        record: What the backward passes have gathered.
        gradient: Squared norm of the mean gradient per parameter.
        scale: Factor that brings the record's squared norms to the same units.
        coverage: How each parameter's calls are read.
        weights: What examples and micro-batches weigh.
        options: How finely the estimators read.
        calibration: What the normalisation layers stand for.
        num_ranks: Processes whose statistics will be added to these.
    """

    record: StepRecord
    gradient: Tensor
    scale: Tensor | float
    coverage: Mapping[str, str]
    weights: StepWeights
    options: EstimatorOptions
    calibration: Calibration
    num_ranks: int = 1

    @property
    def passes(self) -> Sequence[ForwardPass]:
        """The step's micro-batches."""
        return self.record.passes

    def table(self, found: Mapping[int, Tensor]) -> Tensor:
        """Squared norms ``(Q, K)`` of ``K`` units, zero for unused parameters."""
        unused = torch.zeros_like(next(iter(found.values())))
        rows = [found.get(index, unused) for index in range(len(self.gradient))]
        return torch.stack([row.to(self.gradient.dtype) for row in rows]) * self.scale

    def units(
        self,
        tables: Sequence[Tensor],
        weight_sq_sum: Number,
        *,
        read: Sequence[float] | None = None,
    ) -> tuple[GradientMoments, GradientMoments]:
        """Return total and per-parameter moments of units, by micro-batch ``(Q, K)``.

        Args:
            tables: Squared norms of the units.
            weight_sq_sum: ``sum w_k²`` over all units.
            read: By table, how many units each of its columns stands for.
        """
        factors = read or [1.0] * len(tables)
        columns = [table.sum(0) for table in tables]
        num_units = sum(
            round(factor * table.shape[1])
            for factor, table in zip(factors, tables, strict=True)
        )
        num_read = sum(table.shape[1] for table in tables)
        size: Number = 1.0
        if weight_sq_sum is not self.weights.example_sq_sum:
            size = weight_sq_sum / self.weights.example_sq_sum
            size = size if isinstance(size, Tensor) else round(size, 9)
        total, layers = (
            GradientMoments(
                num_units,
                size,
                weight_sq_sum,
                _added(parts, factors, 1, dim),
                _added(parts, factors, 2, dim),
                gradient,
                None if read is None else num_read,
            )
            for parts, gradient, dim in (
                (columns, self.gradient.sum(), 0),
                (tables, self.gradient, 1),
            )
        )
        return total, layers


def _added(
    parts: Sequence[Tensor], factors: Sequence[float], power: int, dim: int
) -> Tensor:
    """Sum over tables and their last axis of ``part ** power``, tables weighted."""
    sums = [(p if power == 1 else p.square()).sum(dim) for p in parts]
    if any(factor != 1.0 for factor in factors):
        sums = [s * factor for s, factor in zip(sums, factors, strict=True)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


@dataclass(frozen=True, slots=True)
class StepNoise:
    """What one estimator says of a step.

    Attributes:
        name: Its name.
        label: The same with the size of its units, where those are several examples.
        methods: By parameter, how it was read.
        moments: Sufficient statistics.
        layer_moments: The same with one entry per parameter, where they exist.
        note: What a reader must know.
        example_sq_norms: ``|g_i|²``, where all examples were read.
    """

    name: str
    label: str
    methods: Mapping[str, str]
    moments: GradientMoments
    layer_moments: GradientMoments | None = None
    note: str | None = None
    example_sq_norms: Tensor | None = None


def call_fault(evidence: Evidence, found: Callable[[ForwardPass], object]) -> str:
    """Why layers' calls tell nothing, if so; ``found`` is what they must have left."""
    faults = [f for p in evidence.passes for f in (*p.faults, *p.unread.values())]
    if faults:
        return faults[0]
    if not all(found(p) for p in evidence.passes):
        return "no layer's call was captured in this step"
    if evidence.record.num_examples * evidence.num_ranks < 2:
        return f"noise needs 2 examples per step, got {evidence.record.num_examples}"
    return ""
