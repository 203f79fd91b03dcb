"""Which batch size a probe's readings support, and what limits that advice."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import batch_norms
from noisekit.core.results import Estimate, Interval, Status
from noisekit.probes.reading import Reading

FEW_READINGS = 20
"""Below so many readings the interval over steps is itself not well known."""

_AROUND = 8
"""Candidates reach from a share to a multiple of present size and noise scale."""


@dataclass(frozen=True, slots=True)
class BatchSizeAdvice:
    r"""The trade-off between steps and examples that the noise scale predicts.

    With the best learning rate at each batch size ``B``, the same progress takes

    .. math:: S = S_{min} (1 + B_{noise} / B), \quad E = E_{min} (1 + B / B_{noise})

    steps and examples (McCandlish et al. 2018, arXiv:1812.06162, eq. 2.7 and appendix
    D), where ``S_min`` is what the largest batches and ``E_min`` what the smallest
    need. At ``B = B_noise`` both are twice the least possible.

    Attributes:
        noise_scale: ``B_noise``, the simple noise scale with its interval, in ``unit``.
        batch_size: The present batch, in ``unit``.
        unit: ``"examples"`` or ``"tokens"``.
        limits: What limits the advice, one sentence each.
        sizes: Candidate batch sizes.
    """

    noise_scale: Estimate
    batch_size: float
    unit: str
    limits: tuple[str, ...]
    sizes: tuple[float, ...] = field(repr=False)

    @property
    def interval(self) -> Interval:
        """The 95 % confidence set of the noise scale; it may be unbounded."""
        if self.noise_scale.status is Status.UNAVAILABLE:
            return Interval(0.0, math.inf, 0.95)
        return self.noise_scale.interval(0.95)

    @property
    def sentence(self) -> str:
        """The advice in words, never without how sure it is."""
        scale, interval = self.noise_scale, self.interval
        if scale.status is Status.UNAVAILABLE:
            return f"No batch size can be advised: {scale.note or 'nothing was read'}."
        now = f"the present batch of {self.batch_size:,.4g}"
        if math.isinf(interval.high):
            if interval.low <= 0:
                return (
                    "The readings do not resolve the noise scale: noise hides the "
                    f"gradient, and they support no batch size over another; {now} "
                    f"{self.unit} may be too small or large enough."
                )
            steps = 1 + interval.low / self.batch_size
            return (
                f"The noise scale is above {interval.low:,.4g} {self.unit} (95 %) and "
                f"has no upper bound: batches up to {interval.low:,.4g} cost at most "
                f"twice the fewest examples, and {now} takes at least {steps:.2f} "
                "times the fewest steps."
            )
        low, high = interval.low, interval.high
        steps, examples = self._relative(scale.value, self.batch_size)
        return (
            f"The noise scale is {scale.value:,.4g} {self.unit}, 95 % interval "
            f"{low:,.4g} to {high:,.4g}: a batch of the noise scale takes twice the "
            f"fewest steps and twice the fewest examples; {now} takes {steps:.2f} "
            f"({_span(1 + low / self.batch_size, 1 + high / self.batch_size)}) times "
            f"the fewest steps and {examples:.2f} "
            f"({_span(1 + self.batch_size / high, _over(self.batch_size, low))}) times "
            "the fewest examples."
        )

    def table(self) -> pd.DataFrame:
        """Return steps and examples at the candidate sizes, relative to the fewest.

        Columns ``batch_size``, ``present`` (whether it is the present one), ``steps``,
        ``steps_low``, ``steps_high``, ``examples``, ``examples_low`` and
        ``examples_high``; the ends are those of the interval of the noise scale, and
        values are NaN where it has none.
        """
        low, high = self.interval.low, self.interval.high
        rows = []
        for size in self.sizes:
            steps, examples = self._relative(self.noise_scale.value, size)
            rows.append(
                {
                    "batch_size": size,
                    "present": size == self.batch_size,
                    "steps": steps,
                    "steps_low": 1 + low / size,
                    "steps_high": 1 + high / size,
                    "examples": examples,
                    "examples_low": 1 + size / high,
                    "examples_high": _over(size, low),
                }
            )
        return pd.DataFrame(rows)

    def _relative(self, scale: float, size: float) -> tuple[float, float]:
        if not scale > 0:
            return math.nan, math.nan
        return 1 + scale / size, 1 + size / scale

    def __str__(self) -> str:
        """Write the sentence, the limits and the table."""
        limits = [f"- {limit}" for limit in self.limits]
        if self.noise_scale.status is Status.UNAVAILABLE:
            return "\n".join([self.sentence, *limits])
        head = f"{'batch':>12}  {'steps':>22}  {'examples':>22}"
        rows = [
            f"{row.batch_size:>12,.6g}  {_cell(row, 'steps'):>22}  "
            f"{_cell(row, 'examples'):>22}{'  (present)' if row.present else ''}"
            for row in self.table().itertuples()
        ]
        return "\n".join([self.sentence, *limits, head, *rows])


def advice_of(
    scale: Estimate,
    readings: Sequence[Reading],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    candidates: Iterable[float] | None,
) -> BatchSizeAdvice:
    """Return what readings and their noise scale say about batch sizes.

    Args:
        scale: Noise scale over the readings.
        readings: Those that it is of.
        model: Whose gradients they are.
        optimizer: What trains it.
        candidates: Batch sizes of the table; powers of two by default.

    Raises:
        UsageError: If a candidate is not positive.
    """
    last = readings[-1] if readings else None
    tokens = None if last is None else last.tokens
    counted = tokens is not None and last is not None and last.unit == "token"
    present = math.nan if last is None else float(last.batch_size)
    if tokens is not None and counted:
        present = tokens.total
    sizes = tuple(candidates) if candidates is not None else _around(scale, present)
    if any(not size > 0 for size in sizes):
        raise UsageError(f"candidates needs batch sizes above 0, got {sizes}.")
    if math.isfinite(present):
        sizes = tuple(sorted({*map(float, sizes), present}))
    return BatchSizeAdvice(
        scale,
        present,
        "tokens" if counted else "examples",
        tuple(_limits(scale, readings, model, optimizer)),
        sizes,
    )


def _limits(
    scale: Estimate,
    readings: Sequence[Reading],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Iterable[str]:
    """Yield what limits the advice, the worst first.

    Yields:
        Sentences.
    """
    unavailable = scale.status is Status.UNAVAILABLE
    if scale.status in (Status.NOT_RESOLVED, Status.NO_SIGNAL):
        yield (
            "not resolved: noise hides the gradient in these readings; take more of "
            "them, or read with a larger batch"
        )
    if scale.note and not unavailable:
        yield f"of a part of the readings or parameters: {scale.note}"
    if batch_norms(model):
        yield (
            "BatchNorm couples the examples of a batch, so that the network itself "
            "changes with the batch size; keep the micro-batch that it sees constant"
        )
    if not unavailable and len(readings) < FEW_READINGS:
        yield (
            f"few steps: {len(readings)} readings, fewer than {FEW_READINGS}, whose "
            "spread is itself not well known"
        )
    if not isinstance(optimizer, torch.optim.SGD):
        yield (
            f"{type(optimizer).__name__}: the noise scale is about SGD; for language "
            "models trained with Adam it was found orders of magnitude below the "
            "critical batch size (Merrill et al. 2025, arXiv:2505.23971)"
        )
    if not unavailable:
        yield (
            f"of steps {readings[0].step} to {readings[-1].step}: the noise scale "
            "usually grows as the loss falls; ask again later in training"
        )
        yield (
            "the simple noise scale takes all directions to be equally curved, and the "
            "trade-off needs the best learning rate at each batch size"
        )


def _around(scale: Estimate, present: float) -> tuple[float, ...]:
    """Powers of two around the present batch and the noise scale."""
    known = [value for value in (scale.value, present) if 0 < value < math.inf]
    if not known:
        return ()
    low = max(0, math.floor(math.log2(min(known) / _AROUND)))
    high = max(low, math.ceil(math.log2(max(known) * _AROUND)))
    return tuple(2.0**power for power in range(low, min(high, low + 24) + 1))


def _over(size: float, low: float) -> float:
    return 1 + size / low if low > 0 else math.inf


def _span(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}" if math.isfinite(high) else f"{low:.2f} or more"


def _cell(row: object, name: str) -> str:
    value = getattr(row, name)
    span = _span(getattr(row, f"{name}_low"), getattr(row, f"{name}_high"))
    return f"{value:.2f} ({span})" if math.isfinite(value) else f"({span})"
