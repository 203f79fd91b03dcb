"""What a step has left for the estimators: statistics in units of the mean gradient."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.step_record import UNSEEN, ForwardPass, StepRecord
from noisekit.probes.capture.step_weights import Number, StepWeights, scale_of_sum
from noisekit.probes.context import ProbeContext


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that a step has left for the estimators.

    With ``u_i`` the contribution of example ``i`` to the mean gradient and ``Q``
    parameters that are read:

    Attributes:
        record: What the backward passes have left, in the gradient's own units.
        gradient: ``|sum u_i|²`` per parameter ``(Q,)``.
        scale: Factor from the record's squared norms to those of the mean gradient.
        methods: By parameter: how its calls are read.
        weights: Weights of examples and micro-batches in the mean.
        num_ranks: Processes whose statistics will be added to these.
    """

    record: StepRecord
    gradient: Tensor
    scale: Number
    methods: Mapping[str, str]
    weights: StepWeights
    num_ranks: int = 1

    @classmethod
    def of(
        cls, record: StepRecord, context: ProbeContext, loss_scale: Tensor | None
    ) -> "StepInputs":
        """Return the inputs of one step on this rank, whose record has a gradient.

        Args:
            record: What the step's backward passes have left.
            context: The loop's conventions.
            loss_scale: The factor of loss scaling that is in the gradients.
        """
        assert record.gradient is not None
        scale: Number = 1.0
        if loss_scale is not None:  # in the gradient's own precision
            scale = loss_scale.to(record.gradient.dtype).pow(-2)
        reduction, recorder = context.loss_reduction, context.recorder
        scale = scale * scale_of_sum(record.passes, reduction, record.num_examples)
        return cls(
            record,
            record.gradient * scale,
            scale,
            recorder.plan.coverage(),
            context.weights_of(record),
            recorder.replicas.ranks.size,
        )

    @property
    def passes(self) -> Sequence[ForwardPass]:
        """The step's micro-batches."""
        return self.record.passes

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.methods)

    @property
    def unread(self) -> dict[int, str]:
        """Parameters that some micro-batch tells nothing of, by index, and why."""
        return {i: why for p in reversed(self.passes) for i, why in p.unread.items()}

    def fault(self) -> str:
        """Why the step tells nothing of its examples or micro-batches, if so."""
        if self.record.faults:
            return self.record.faults[0]
        if not self.passes:
            return UNSEEN
        if any(p.num_examples is None for p in self.passes):
            return "the model's input has no tensor with a batch axis"
        return ""

    def call_fault(
        self, found: Callable[[ForwardPass], Collection[int]]
    ) -> Unavailable | None:
        """Why the layers' calls tell nothing, if so.

        Args:
            found: The parameters that a micro-batch's calls were read of, by index.
        """
        faults, unread = [fault for p in self.passes for fault in p.faults], self.unread
        if not faults and not all(set(found(p)) - unread.keys() for p in self.passes):
            faults = list(unread.values())
            faults.append("no layer's call was captured in this step")
        if not faults and self.record.num_examples * self.num_ranks < 2:
            faults.append(
                f"noise needs 2 examples per step, got {self.record.num_examples}"
            )
        return Unavailable(faults[0]) if faults else None

    def table(self, found: Mapping[int, Tensor]) -> Tensor:
        """Squared norms ``(Q, K)`` of ``K`` units.

        Zero for parameters that the pass did not use, or that could not be read.
        """
        unused, unread = torch.zeros_like(next(iter(found.values()))), self.unread
        rows = [
            unused if index in unread else found.get(index, unused)
            for index in range(len(self.gradient))
        ]
        return torch.stack([row.to(self.gradient.dtype) for row in rows]) * self.scale

    def units(
        self,
        tables: Sequence[Tensor],
        weight_sq_sum: Number,
        *,
        read: Sequence[float] | None = None,
        without: Mapping[int, str] | None = None,
    ) -> tuple[GradientMoments, GradientMoments]:
        """Return total and per-parameter moments of units, by micro-batch ``(Q, K)``.

        Args:
            tables: Squared norms of the units.
            weight_sq_sum: ``sum w_k²`` over all units.
            read: By table, how many units each of its columns stands for.
            without: Indices of parameters that the tables leave out; these are not
                counted in the total either, and have no moments of their own.
        """
        factors = read or [1.0] * len(tables)
        columns = [table.sum(0) for table in tables]  # (K,)
        num_units = sum(
            round(factor * table.shape[1])
            for factor, table in zip(factors, tables, strict=True)
        )
        size: Number = 1.0
        if weight_sq_sum is not self.weights.example_sq_sum:
            size = weight_sq_sum / self.weights.example_sq_sum
            size = size if isinstance(size, Tensor) else round(size, 9)
        gradient = self.gradient
        if without:
            gradient = gradient.where(self.mask(without), 0.0)
        total, layers = (
            GradientMoments(
                num_units,
                size,
                weight_sq_sum,
                _added(parts, factors, 1, dim),
                _added(parts, factors, 2, dim),
                norms,
                None if read is None else sum(table.shape[1] for table in tables),
            )
            for parts, norms, dim in (
                (columns, gradient.sum(), 0),
                (tables, gradient, 1),
            )
        )
        return total, self.masked(layers, without or {})

    def masked(
        self, layers: GradientMoments, without: Mapping[int, str]
    ) -> GradientMoments:
        """Return per-parameter moments that are NaN where there are none."""
        if not without:
            return layers
        return layers.where(self.mask(without))

    def mask(self, without: Mapping[int, str]) -> Tensor:
        """Whether each parameter is read ``(Q,)``; nothing waits for the device."""
        read = [index not in without for index in range(len(self.gradient))]
        return torch.tensor(read).to(self.gradient.device, non_blocking=True)


def _added(
    parts: Sequence[Tensor], factors: Sequence[float], power: int, dim: int
) -> Tensor:
    """Sum over tables and their last axis of ``part ** power``, tables weighted."""
    sums = [(p if power == 1 else p.square()).sum(dim) for p in parts]
    if any(factor != 1.0 for factor in factors):
        sums = [s * factor for s, factor in zip(sums, factors, strict=True)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
