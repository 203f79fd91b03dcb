"""One step's statistics over all ranks: packed, summed in one go, made a reading.

Each rank's reading is of its own mean gradient. Rank ``k`` enters the mean over all
with the weight ``W_k``: its share of the examples where losses are sums, and the same
as every other rank where they are means, since data parallelism averages the ranks'
gradients as they are. Its statistics then count ``W_k²`` and ``W_k⁴``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.step_weights import LossReduction, Number
from noisekit.probes.capture.tokens import TokenCount
from noisekit.probes.ranks.rank_payload import StepParts
from noisekit.probes.reading import Reading

_HEADER, _SLOT = 6, 10
_REPLAYED = "ghost"
"""Replays have no gradient in common: their statistics are averaged over the ranks."""


@dataclass(frozen=True, slots=True)
class RankPart:
    """One rank's part of a step.

    Attributes:
        reading: Of this rank alone.
        num_seen: Examples since the last reading, this step's included.
        count: What this rank's examples count together, in a loss that is a sum.
        parts: What the quantities beside the noise take, if there are such.
    """

    reading: Reading
    num_seen: int
    count: Number
    parts: StepParts | None = None


@dataclass(frozen=True, slots=True)
class RankSums:
    """How the statistics of one step lie in the vector that is summed over ranks.

    Every rank's vector has the same length, whatever it could read: one that could
    not, or has no inputs left, adds zeros.

    Attributes:
        num_params: Parameters that are read.
        names: Estimators that were asked for; the first is the reading's own.
        loss_reduction: What the loss does over a micro-batch.
        num_ranks: All ranks, those without inputs included.
        num_parts: Entries for the quantities beside the noise.
    """

    num_params: int
    names: tuple[str, ...]
    loss_reduction: LossReduction
    num_ranks: int
    num_parts: int = 0

    def absent(self, device: torch.device) -> Tensor:
        """Return the vector of a rank that has no part in the step."""
        size = self._start_of_parts + self.num_parts + 4 * self.num_params
        return torch.zeros(size, dtype=torch.float64, device=device)

    def packed(self, part: RankPart) -> Tensor:
        """Return this rank's vector."""
        reading, weight = part.reading, self._weight(part)
        device = reading.layer_sq_norms.device
        header = (float(reading.batch_size), 1.0, float(part.num_seen), part.count)
        parts = [_vector((*header, *_tokens(reading, weight)), device)]
        for asked in self.names:
            name = _found_name(reading, asked)
            moments = reading.estimates.get(name)
            if moments is None:
                parts.append(_vector((0.0,) * _SLOT, device))
            else:
                own = 1.0 if name == _REPLAYED else weight
                parts.append(_vector(_slot(moments, name, own), device))
        if part.parts is not None:
            parts.append(part.parts.packed(weight, reading.layer_sq_norms))
        parts.append(reading.layer_sq_norms.double() * weight**2)
        layers = reading.layer_moments
        if layers is None:
            parts.append(_vector((0.0,) * (3 * self.num_params), device))
        else:
            parts.append(layers.grad_sq_norm.double() * weight**2)
            parts.append(layers.sum_sq_norm.double() * weight**2)
            parts.append(layers.sum_fourth.double() * weight**4)
        return torch.cat(parts)

    @property
    def _start_of_parts(self) -> int:
        return _HEADER + _SLOT * len(self.names)

    def parts(
        self, own: StepParts, sums: Tensor, *, mean_over_active: bool
    ) -> StepParts:
        """Return what quantities take of all ranks; transfers the sums to the host.

        Args:
            own: This rank's.
            sums: The sum of all vectors.
            mean_over_active: As for ``reading``.
        """
        sums, start = sums.cpu(), self._start_of_parts
        _, num_active, _, counted, *_ = sums[:_HEADER].tolist()
        total = counted if self.loss_reduction == "sum" else num_active
        averaged = num_active if mean_over_active else float(self.num_ranks)
        found = own.of_all(sums[start : start + self.num_parts], total, num_active)
        # From a step along the applied gradient to one along the mean's.
        return replace(found, rates=found.rates * (total / averaged))

    def num_seen(self, sums: Tensor) -> Tensor:
        """Return the examples that all ranks have seen since the last reading."""
        return sums[2]

    def _weight(self, part: RankPart) -> Number:
        """``W_k``, up to a factor that only the sum over ranks tells."""
        return part.count if self.loss_reduction == "sum" else 1.0

    def reading(
        self,
        part: RankPart,
        sums: Tensor,
        *,
        examples_seen: int,
        mean_over_active: bool,
    ) -> Reading:
        """Return the reading of all ranks; transfers the sums to the host.

        Its bits are the same on every rank, also those of the reduced gradient's norm,
        which each rank knows in its own units.

        Args:
            part: This rank's.
            sums: The sum of all vectors.
            examples_seen: By all ranks, this step included.
            mean_over_active: Whether gradients are averaged over the ranks that had
                inputs, not over all.
        """
        local, sums = part.reading, sums.cpu()
        num_examples, num_active, _, counted, *tokens = sums[:_HEADER].tolist()
        total = counted if self.loss_reduction == "sum" else num_active
        averaged = num_active if mean_over_active else float(self.num_ranks)
        # From the gradient as it is applied to the mean over all examples.
        factor = (averaged / total) ** 2 / num_active
        slots = sums[_HEADER : _HEADER + _SLOT * len(self.names)].view(-1, _SLOT)
        estimates, missing = self._estimates(local, slots, (total, num_active, factor))
        gradient, norm, first, fourth = sums[-4 * self.num_params :].view(4, -1)
        asked = self.names[0]
        own = estimates.get(_found_name(local, asked))
        layers = None
        if own is not None and local.layer_moments is not None:
            layers = replace(
                own,
                sum_sq_norm=first / total**2,
                sum_fourth=fourth / total**4,
                grad_sq_norm=norm * factor,
            )
        reason = missing.pop(asked, None)
        counted = _all_tokens(*tokens, total=total)
        if local.unit == "token" and counted is None:
            missing.setdefault("tokens", "not every rank could count its tokens")
        return replace(
            local,
            examples_seen=examples_seen,
            batch_size=int(num_examples),
            estimator="none" if own is None else _label(local.estimator, own),
            coverage=replace(local.coverage, reason=reason, missing=missing),
            moments=own,
            layer_moments=layers,
            layer_sq_norms=gradient * factor,
            example_sq_norms=None if own is None else local.example_sq_norms,
            estimates=estimates,
            tokens=counted,
        )

    def _estimates(
        self, local: Reading, slots: Tensor, totals: tuple[float, float, float]
    ) -> tuple[dict[str, GradientMoments], dict[str, str]]:
        """What the estimators say, and why others say nothing."""
        total, num_active, factor = totals
        estimates: dict[str, GradientMoments] = {}
        missing = dict(local.coverage.missing)
        if local.coverage.reason is not None:
            missing[self.names[0]] = local.coverage.reason
        for asked, slot in zip(self.names, slots.tolist(), strict=True):
            name = _found_name(local, asked)
            fault = _fault(slot, num_active)
            if fault:
                missing.setdefault(asked, fault)
            else:
                estimates[name] = _summed(slot, name, total, factor)
        return estimates, missing


def _tokens(reading: Reading, weight: Number) -> tuple[Number, Number]:
    """A rank's tokens, and ``sum w_i²`` of its sequences; NaN if not known."""
    if reading.tokens is None:
        return (math.nan,) * 2 if reading.unit == "token" else (0.0, 0.0)
    count, per_sequence = reading.tokens.values
    return count, per_sequence / count * weight**2


def _all_tokens(count: float, squares: float, *, total: float) -> TokenCount | None:
    """The tokens of all ranks; ``None`` where some rank does not know its own."""
    if not count > 0.0:
        return None
    values = (count, count * squares / total**2)
    return TokenCount(torch.tensor(values, dtype=torch.float64))


def _found_name(reading: Reading, asked: str) -> str:
    """The estimator that ``asked`` has come to: "auto" takes the first that says."""
    return next(iter(reading.estimates), asked) if asked == "auto" else asked


def _label(local: str, moments: GradientMoments) -> str:
    name, _, size = local.partition("(")
    if name == _REPLAYED:
        return local  # what a model's statistics are of, whatever examples weigh
    return f"{name}({float(moments.unit_size):g})" if size else name


def _slot(moments: GradientMoments, name: str, weight: Number) -> tuple[Number, ...]:
    """One estimator's entry; the name's code tells whether all have read alike."""
    code = float(crc32(name.encode()) % (1 << 20))  # its square sums exactly
    read = moments.num_units if moments.num_read is None else moments.num_read
    squares = weight**2 * moments.weight_sq_sum
    return (
        1.0,
        code,
        code**2,
        float(moments.num_units),
        float(read),
        squares,
        squares / moments.unit_size,
        moments.sum_sq_norm * weight**2,
        moments.sum_fourth * weight**4,
        moments.grad_sq_norm * weight**2,
    )


def _vector(values: Sequence[Number], device: torch.device) -> Tensor:
    """Return the values as one vector, without copies from the host, which wait."""
    parts = [
        value.detach().double().reshape(1)
        if isinstance(value, Tensor)
        else torch.full((1,), value, dtype=torch.float64, device=device)
        for value in values
    ]
    return torch.cat(parts)


def _fault(slot: Sequence[float], num_active: float) -> str:
    """Why the ranks' statistics cannot be put together, if so."""
    present, code, code_sq = slot[:3]
    if present < num_active:
        return f"only {present:g} of {num_active:g} ranks could read their examples"
    if code_sq * present != code**2:
        return (
            "the ranks have read in different ways; name an estimator that all of "
            "them can take, such as 'accumulation'"
        )
    return ""


def _summed(
    slot: Sequence[float], name: str, total: float, factor: float
) -> GradientMoments:
    """Return one estimator's moments over all ranks; of replays, their average."""
    present, _, _, num_units, num_read, squares, by_size, *norms = slot
    scales = (total**-2, total**-4, factor)
    if name == _REPLAYED:
        scales = (1 / present,) * 3
    first, fourth, gradient = (
        torch.tensor(norm * scale, dtype=torch.float64)
        for norm, scale in zip(norms, scales, strict=True)
    )
    return GradientMoments(
        int(num_units),
        squares / by_size,
        squares * scales[0],
        first,
        fourth,
        gradient,
        None if num_read == num_units else int(num_read),
    )
