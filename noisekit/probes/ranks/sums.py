r"""Statistics of one step over all ranks: packed, summed in one all-reduce, unpacked.

Each rank's statistics are of its own mean gradient, with contributions ``u_i``. In the
mean over all ranks rank ``k`` has the weight :math:`W_k / \sum_l W_l`: its share of the
examples where losses are sums, and equal weights where they are means, since data
parallelism averages the ranks' gradients as they are. Therefore

.. math:: \sum_i |u_i|^2 = \frac{\sum_k W_k^2 \sum_{i \in k} |u_i^{(k)}|^2}
          {(\sum_k W_k)^2}, \qquad
          \sum_i |u_i|^4 = \frac{\sum_k W_k^4 \sum_{i \in k} |u_i^{(k)}|^4}
          {(\sum_k W_k)^4}

All that is summed is in double precision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from zlib import crc32

import torch
from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.step_weights import LossReduction, Number
from noisekit.probes.capture.tokens import TokenCount
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.estimator_set import EstimatedNoise
from noisekit.probes.ranks.layout import Part, VectorLayout
from noisekit.probes.step_metrics.metric import State, StepMetric
from noisekit.probes.step_result import StepResult

_HEADER = {"batch_size": 1, "num_active": 1, "num_seen": 1, "count": 1, "tokens": 2}
_SLOT = 10
"""Numbers in the entry of one estimator; see ``_slot``."""
_LAYERS = ("gradient", "layer_norm", "layer_first", "layer_fourth")
_METHODS_DIFFER = (
    "the ranks have read in different ways; name an estimator that all of them can "
    "take, such as 'accumulation'"
)


@dataclass(frozen=True, slots=True)
class RankPart:
    """One rank's part of a step.

    Attributes:
        result: Of this rank alone.
        num_seen: Examples since the last reading, this step's included.
        count: What this rank's examples count together, in a loss that is a sum.
    """

    result: StepResult
    num_seen: int
    count: Number


@dataclass(frozen=True)
class RankSums:
    """How the statistics of one step lie in the vector that is summed over ranks.

    Every rank's vector has the same length, whatever it could read: one that could
    not, or has no inputs left, adds zeros.

    Attributes:
        num_params: Parameters that are read.
        names: Estimators that were asked for; the first is the reading's own.
        loss_reduction: What the loss does over a micro-batch.
        num_ranks: All ranks, those without inputs included.
        metrics: Step metrics, whose states are summed by name.
    """

    num_params: int
    names: tuple[str, ...]
    loss_reduction: LossReduction
    num_ranks: int
    metrics: tuple[StepMetric, ...] = ()

    @cached_property
    def layout(self) -> VectorLayout:
        """Names and sizes of the parts."""
        slots = {f"estimator.{name}": _SLOT for name in self.names}
        states = {}
        for metric in self.metrics:
            if metric.rank_sums:
                states[f"{metric.name}.known"] = 1
            for name, rank_sum in metric.rank_sums.items():
                states[f"{metric.name}.{name}"] = rank_sum.size
        layers = dict.fromkeys(_LAYERS, self.num_params)
        return VectorLayout({**_HEADER, **slots, **states, **layers})

    def absent(self, device: torch.device) -> Tensor:
        """Return the vector of a rank that has no part in the step."""
        return self.layout.packed({}, device)

    # --------------------------------------------------------------------- packing

    def packed(self, part: RankPart) -> Tensor:
        """Return this rank's vector."""
        result, weight = part.result, self._weight(part)
        parts: dict[str, Part] = {
            "batch_size": float(result.batch_size),
            "num_active": 1.0,
            "num_seen": float(part.num_seen),
            "count": part.count,
            "tokens": _packed_tokens(result, weight),
            "gradient": result.gradient.double() * weight**2,
        }
        for asked in self.names:
            noise = _noise_of(result, asked)
            if noise is not None:
                own = 1.0 if noise.averaged else weight
                parts[f"estimator.{asked}"] = _slot(noise, own)
        for metric, state in result.states.items():
            if not isinstance(state, Unavailable):
                parts |= _packed_state(metric, state, weight)
        own_noise = result.noise.noise
        layers = own_noise.layer_moments if isinstance(own_noise, StepNoise) else None
        if layers is not None:
            parts["layer_norm"] = layers.grad_sq_norm.double() * weight**2
            parts["layer_first"] = layers.sum_sq_norm.double() * weight**2
            parts["layer_fourth"] = layers.sum_fourth.double() * weight**4
        return self.layout.packed(parts, result.gradient.device)

    def _weight(self, part: RankPart) -> Number:
        """``W_k``, not normalized: its sum over ranks is known after the all-reduce."""
        return part.count if self.loss_reduction == "sum" else 1.0

    def num_seen(self, sums: Tensor) -> Tensor:
        """Return the examples that all ranks have seen since the last reading."""
        return self.layout.unpacked(sums)["num_seen"].reshape(())

    # ------------------------------------------------------------------- unpacking

    def whole(
        self,
        local: StepResult,
        sums: Tensor,
        *,
        examples_seen: int,
        mean_over_active: bool,
    ) -> StepResult:
        """Return the result of all ranks; transfers the sums to the host.

        Its bits are the same on every rank, also those of the reduced gradient's norm,
        which each rank knows in its own units.

        Args:
            local: This rank's.
            sums: The sum of all vectors.
            examples_seen: By all ranks, this step included.
            mean_over_active: Whether gradients are averaged over the ranks that had
                inputs, not over all.
        """
        parts = self.layout.unpacked(sums.cpu())
        num_active, counted = (float(parts[name]) for name in ("num_active", "count"))
        total = counted if self.loss_reduction == "sum" else num_active
        averaged = num_active if mean_over_active else float(self.num_ranks)
        # The applied gradient, an average over ranks, relative to the mean over all
        # examples. Every active rank has added the same |g|^2, hence 1 / num_active.
        factor = (averaged / total) ** 2 / num_active
        totals = _Totals(total, num_active, factor)
        return replace(
            local,
            examples_seen=examples_seen,
            batch_size=int(parts["batch_size"]),
            gradient=parts["gradient"] * factor,
            noise=self._noise(local, parts, totals),
            states={
                metric: _summed_state(metric, state, parts, totals)
                for metric, state in local.states.items()
            },
            tokens=_all_tokens(local, parts["tokens"].tolist(), total),
            applied_factor=total / averaged,
        )

    def _noise(
        self, local: StepResult, parts: Mapping[str, Tensor], totals: "_Totals"
    ) -> EstimatedNoise:
        """The noise over all ranks, and why some estimators have none."""
        found: dict[str, StepNoise] = {}
        missing = dict(local.noise.missing)
        for asked in self.names:
            slot, own = parts[f"estimator.{asked}"].tolist(), _noise_of(local, asked)
            fault = _fault(slot, totals.num_active)
            if fault or own is None:
                missing.setdefault(asked, Unavailable(fault))
                continue
            moments = _summed(slot, own, totals)
            layers = own.layer_moments if asked == self.names[0] else None
            if layers is not None:
                layers = replace(
                    moments,
                    sum_sq_norm=parts["layer_first"] / totals.total**2,
                    sum_fourth=parts["layer_fourth"] / totals.total**4,
                    grad_sq_norm=parts["layer_norm"] * totals.factor,
                )
            found[own.name] = replace(
                own, label=_label(own, moments), moments=moments, layer_moments=layers
            )
        return EstimatedNoise(found, self.names, missing)


@dataclass(frozen=True, slots=True)
class _Totals:
    """Divisors of the sums over ranks.

    Attributes:
        total: ``sum_k W_k``.
        num_active: Ranks that took part.
        factor: From the ranks' sum of the applied gradient's ``|g|²`` to the mean's.
    """

    total: float
    num_active: float
    factor: float


def _noise_of(result: StepResult, asked: str) -> StepNoise | None:
    """The noise of the estimator that ``asked`` has come to, which "auto" chooses."""
    if asked in result.noise.missing:
        return None
    if asked == "auto":
        return next(iter(result.noise.found.values()))
    return result.noise.found.get(asked)


def _packed_tokens(result: StepResult, weight: Number) -> tuple[Number, Number]:
    """A rank's tokens, and ``sum w_i²`` of its sequences; NaN if not known."""
    if result.tokens is None:
        return (0.0, 0.0)
    if isinstance(result.tokens, Unavailable):
        return (math.nan, math.nan)
    count, per_sequence = result.tokens.values
    return count, per_sequence / count * weight**2


def _all_tokens(
    local: StepResult, sums: Sequence[float], total: float
) -> TokenCount | Unavailable | None:
    """The tokens of all ranks, where every rank knows its own."""
    if isinstance(local.tokens, Unavailable) or local.tokens is None:
        return local.tokens
    count, squares = sums
    if not count > 0.0:
        return Unavailable("not every rank could count its tokens")
    values = (count, count * squares / total**2)
    return TokenCount(torch.tensor(values, dtype=torch.float64))


def _packed_state(metric: StepMetric, state: State, weight: Number) -> dict[str, Part]:
    """A metric's tensors that are summed, times their power of the weight."""
    sums = metric.rank_sums
    if not sums:
        return {}
    parts: dict[str, Part] = {f"{metric.name}.known": 1.0}
    for name, rank_sum in sums.items():
        value = state[name]
        if isinstance(value, Tensor):
            value = value.double()
        parts[f"{metric.name}.{name}"] = value * weight**rank_sum.power
    return parts


def _summed_state(
    metric: StepMetric,
    own: State | Unavailable,
    parts: Mapping[str, Tensor],
    totals: _Totals,
) -> State | Unavailable:
    """A metric's state over all ranks, on the host; what is not summed is alike."""
    sums = metric.rank_sums
    known = float(parts[f"{metric.name}.known"]) if sums else totals.num_active
    if isinstance(own, Unavailable):
        return own
    if known < totals.num_active:
        return Unavailable(_too_few(known, totals.num_active))
    state: dict[str, Number] = {}
    for name, value in own.items():
        if name in sums:
            power = sums[name].power
            divisor = totals.total**power if power else totals.num_active
            summed = parts[f"{metric.name}.{name}"] / divisor
            value = summed if isinstance(value, Tensor) else float(summed)
        state[name] = value.cpu() if isinstance(value, Tensor) else value
    return state


def _label(own: StepNoise, moments: GradientMoments) -> str:
    name, _, size = own.label.partition("(")
    if own.averaged:
        return own.label  # what a model's statistics are of, whatever examples weigh
    return f"{name}({float(moments.unit_size):g})" if size else name


def _slot(noise: StepNoise, weight: Number) -> tuple[Number, ...]:
    """One estimator's entry, with a code of the method that the rank has used.

    Sums of moments are meaningful only if all ranks used one method. By Cauchy-Schwarz
    ``n sum c_k² = (sum c_k)²`` exactly if all codes are equal, which two entries of the
    same all-reduce can show. A code has 20 bits, so that sums of its square over up to
    8,192 ranks are exact in double precision.
    """
    moments = noise.moments
    way = f"{noise.name}{sorted(noise.unread)}" if noise.unread else noise.name
    code = float(crc32(way.encode()) % (1 << 20))
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


def _fault(slot: Sequence[float], num_active: float) -> str:
    """Why the ranks' statistics cannot be combined; empty if they can."""
    present, code, code_sq = slot[:3]
    if present < num_active:
        return _too_few(present, num_active)
    return _METHODS_DIFFER if code_sq * present != code**2 else ""


def _too_few(present: float, num_active: float) -> str:
    return f"only {present:g} of {num_active:g} ranks could read their examples"


def _summed(slot: Sequence[float], own: StepNoise, totals: _Totals) -> GradientMoments:
    """Return one estimator's moments over all ranks; of replays, their average."""
    # squares / by_size = sum w_i^2 / sum (w_i^2 / b_i) over all ranks, the unit size of
    # GradientMoments.
    present, _, _, num_units, num_read, squares, by_size, *norms = slot
    scales = (totals.total**-2, totals.total**-4, totals.factor)
    if own.averaged:  # replays have no gradient in common
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
