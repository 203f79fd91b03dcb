"""Squared norms of the units' gradients, from a parameter's captured calls."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisekit.core.layers.chunks import (
    call_of_rows,
    chunk_slices,
    chunk_sq_norms,
    shared_chunk_sq_norms,
)
from noisekit.core.layers.per_example import example_sq_norms, square_sums
from noisekit.core.reductions import sq_norms
from noisekit.probes.capture.preconditioner import Preconditioner
from noisekit.probes.capture.sites import SitePlan
from noisekit.probes.capture.step_record import CapturedCall, ForwardPass

_NORM_LAYERS = "normalisation"


@dataclass(slots=True)
class UnitRequest:
    """Which units' squared norms the next passes are read for.

    Attributes:
        per_example: ``|u_i|²`` of every example.
        row_share: Share of the examples that is drawn at random; 0 for none.
        num_chunks: Parts of the batch whose ``|sum u_i|²`` is read; 0 for none.
        norm_layers: ``|u_i|²`` of every example, of normalisation layers alone.
        preconditioned: ``sum |P u_i|²`` with the optimizer's preconditioner ``P``.
        squares: ``sum u_i²`` element by element.
    """

    per_example: bool = False
    row_share: float = 0.0
    num_chunks: int = 0
    norm_layers: bool = False
    preconditioned: bool = False
    squares: bool = False


class UnitNorms:
    """Computes the squared norms of the units that are requested, by parameter.

    Attributes:
        request: What the next passes are read for.
        preconditioner: What the optimizer multiplies gradients by, if that is wanted.
        generator: Draws the rows; never PyTorch's global one.
    """

    def __init__(self, plan: SitePlan, parameters: Sequence[nn.Parameter]) -> None:
        self.request = UnitRequest(per_example=True)
        self.preconditioner: Preconditioner | None = None
        self.generator = torch.Generator().manual_seed(0)
        self._plan = plan
        self._parameters = parameters

    def read(
        self, index: int, calls: Sequence[CapturedCall], *, closure: bool
    ) -> Tensor | None:
        """Read a parameter's calls into their forward pass.

        Returns:
            ``|u_i|²`` of every example, where they were computed; the closure check
            always has them.
        """
        forward_pass, request = calls[0].forward_pass, self.request
        forward_pass.read.add(index)
        every = None
        if request.per_example or closure or self._norm_layer(calls):
            every = self._sq_norms(index, calls)
            forward_pass.sq_norms[index] = every
        if request.row_share:
            forward_pass.row_norms[index] = self._row_sq_norms(index, calls)
        if request.num_chunks:
            forward_pass.chunk_norms[index] = self._chunk_sq_norms(index, calls)
        if request.preconditioned:
            self._read_scaled(index, calls)
        return every

    def start_step(self) -> None:
        """Forget what belonged to the step before."""
        if self.preconditioner is not None:
            self.preconditioner.start_step()

    def scaled_sq_norms(self) -> Tensor | None:
        """Return ``|P .grad|²`` per parameter; ``None`` where ``P`` is not known."""
        preconditioner = self.preconditioner
        if preconditioner is None or not self.request.preconditioned:
            return None
        scaled = []
        for index, parameter in enumerate(self._parameters):
            scale = preconditioner.scale_of(index)
            if scale is None:
                return None
            grad = parameter.grad
            scaled.append(torch.zeros_like(scale) if grad is None else grad * scale)
        return sq_norms(scaled)

    def _norm_layer(self, calls: Sequence[CapturedCall]) -> bool:
        """Whether the calls are wanted as those of a normalisation layer."""
        return self.request.norm_layers and is_norm_layer(calls[0].site.rule.name)

    def _sq_norms(self, index: int, calls: Sequence[CapturedCall]) -> Tensor:
        parameter = self._parameters[index]
        if len(calls) == 1:
            among = self._plan.sole_names(calls[0].site)
            if self.request.squares or self.request.preconditioned:
                calls[0].read_squares(among)
            return calls[0].sq_norms_of(parameter, among)
        return example_sq_norms([(c.site, c.call) for c in calls], parameter)

    def chunks_of(self, captured: CapturedCall) -> tuple[slice, ...]:
        """Return the examples of each chunk, where chunks are read."""
        if not self.request.num_chunks:
            return ()
        return chunk_slices(captured.call.num_examples, self.request.num_chunks)

    def _chunk_sq_norms(self, index: int, calls: Sequence[CapturedCall]) -> Tensor:
        """Of every chunk; those of one call's parameters are computed together."""
        parameter, first = self._parameters[index], calls[0]
        chunks = chunk_slices(first.call.num_examples, self.request.num_chunks)
        if len(calls) > 1:
            contributions = [(captured.site, captured.call) for captured in calls]
            return shared_chunk_sq_norms(contributions, parameter, chunks)
        name = first.site.name_of(parameter)
        if name not in first.chunk_norms:
            among = self._plan.sole_names(first.site)
            names = among if name in among else (name,)
            first.chunk_norms = chunk_sq_norms(first.site, first.call, names, chunks)
        return first.chunk_norms[name]

    def _row_sq_norms(self, index: int, calls: Sequence[CapturedCall]) -> Tensor:
        """``|u_i|²`` of the sampled rows, by a call of them alone if possible."""
        rows = self._rows(calls[0].forward_pass, self._parameters[index])
        parts = [self._part(captured, rows) for captured in calls]
        if any(part is None for part in parts):
            return self._sq_norms(index, calls).index_select(0, rows)
        return self._sq_norms(index, [part for part in parts if part is not None])

    def _rows(self, forward_pass: ForwardPass, like: Tensor) -> Tensor:
        """The sampled examples of a pass, drawn once, in ascending order."""
        if forward_pass.rows is None:
            count = forward_pass.num_examples or 0
            num_rows = max(1, round(self.request.row_share * count))
            drawn = torch.randperm(count, generator=self.generator)
            chosen = drawn[:num_rows].sort().values
            forward_pass.rows = chosen.to(like.device, non_blocking=True)
        return forward_pass.rows

    @staticmethod
    def _part(captured: CapturedCall, rows: Tensor) -> CapturedCall | None:
        """The call restricted to the rows; made once for all its parameters."""
        if len(rows) == captured.call.num_examples:
            return captured
        if captured.part is None:
            call = call_of_rows(captured.site, captured.call, rows)
            if call is None:
                return None
            captured.part = CapturedCall(
                captured.site,
                call,
                captured.forward_pass,
                captured.versions,
                captured.key,
            )
        return captured.part

    def _read_scaled(self, index: int, calls: Sequence[CapturedCall]) -> None:
        preconditioner, forward_pass = self.preconditioner, calls[0].forward_pass
        scale = None if preconditioner is None else preconditioner.scale_of(index)
        if scale is None:
            return  # the optimizer has no state of it yet
        # |P u_i|^2 with diagonal P = diag(p): sum_i sum_j p_j^2 u_ij^2.
        sums = self.square_sums(index, calls)
        forward_pass.scaled_sums[index] = (sums * scale.square()).sum()

    def square_sums(self, index: int, calls: Sequence[CapturedCall]) -> Tensor:
        """``sum u_i²``, stored at the call, or from several calls together."""
        parameter = self._parameters[index]
        name = calls[0].site.name_of(parameter)
        if len(calls) == 1 and name in calls[0].square_sums:
            return calls[0].square_sums[name]
        contributions = [(captured.site, captured.call) for captured in calls]
        return square_sums(contributions, parameter)


def is_norm_layer(way: str) -> bool:
    """Whether a parameter that is read in this way belongs to a normalisation layer."""
    return way.startswith(_NORM_LAYERS)
