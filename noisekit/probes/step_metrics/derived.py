"""Quantities of one step, made of its reading and of what its passes have gathered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noisekit.noise.moments import GradientMoments
from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.noise.step_statistics import (
    inner_product_statistic,
    norm_statistic,
    orthogonality_statistic,
)
from noisekit.probes.capture.step_record import UNSEEN, StepRecord
from noisekit.probes.capture.step_weights import Number
from noisekit.probes.ranks.examples_seen import SummedReading
from noisekit.probes.ranks.rank_payload import StepParts
from noisekit.probes.reading import Reading

Found = Mapping[str, StepQuantity | HessianForms]

_OF_ANOTHER_GRADIENT = ("norm_layers", "preconditioned")
"""Estimators whose noise is not that of the step's own gradient."""


@dataclass(frozen=True, slots=True)
class LaterQuantities:
    """A reading of all ranks, and what follows from its noise once that is known."""

    reading: SummedReading
    names: Sequence[str]

    def resolved(self) -> Reading:
        """Return the whole reading."""
        reading = self.reading.resolved()
        return with_derived(reading, self.names, self.reading.parts())


def with_quantities(
    reading: Reading, found: Found, missing: Mapping[str, str]
) -> Reading:
    """Return the reading with more quantities, and why others are missing."""
    coverage = reading.coverage
    return replace(
        reading,
        quantities={**reading.quantities, **found},
        coverage=replace(coverage, missing={**coverage.missing, **missing}),
    )


def with_derived(
    reading: Reading, names: Sequence[str], parts: StepParts | None
) -> Reading:
    """Return the reading with what follows from its noise and from ``parts``."""
    found: dict[str, StepQuantity | HessianForms] = {}
    missing: dict[str, str] = {}
    for name in names:
        said = _derived(name, reading, parts)
        if isinstance(said, str):
            missing[name] = said
        else:
            found[name] = said
    return with_quantities(reading, found, missing)


def _derived(
    name: str, reading: Reading, parts: StepParts | None
) -> StepQuantity | HessianForms | str:
    moments, layers = reading.moments, reading.layer_moments
    if name == "hessian_noise_scale":
        assert parts is not None
        return parts.hessian
    if moments is None:
        return reading.coverage.reason or "the noise was not read"
    if reading.estimator in _OF_ANOTHER_GRADIENT:
        return f"estimator={reading.estimator!r} is not of the step's own gradient"
    if name in _BY_MOMENTS:
        total = _BY_MOMENTS[name](moments).reshape(1)
        both = [total] if layers is None else [total, _BY_MOMENTS[name](layers)]
        return StepQuantity(torch.cat(both))
    assert parts is not None
    return _cabs(name, reading, parts)


def _cabs(name: str, reading: Reading, parts: StepParts) -> StepQuantity | str:
    layers = reading.layer_moments
    if layers is None:
        return "the noise was not read layer by layer"
    if isinstance(parts.loss, str):
        return parts.loss
    share = layers.weight_sq_sum / layers.unit_size
    spread = layers.trace_and_norm()[0] * (1 - share)
    if name == "cabs_conv_compat":
        if "per_example" not in reading.estimates:
            return "it needs estimator='per_example'"
        if isinstance(parts.positions, str):
            return parts.positions
        apart = parts.positions / share - layers.grad_sq_norm
        spread = spread.clone()
        for index in parts.convolutions:
            spread[index] = apart[index]
    entries = parts.rates * spread / parts.loss
    return StepQuantity(torch.cat((entries.sum().reshape(1), entries)))


def _norm_test(moments: GradientMoments) -> Tensor:
    share = moments.weight_sq_sum / moments.unit_size
    trace, _ = moments.trace_and_norm()
    norm = moments.grad_sq_norm
    # What the examples' own squares add up to, whatever the units were.
    return norm_statistic(share * (trace * (1 - share) + norm), norm, share)


def _gradient_diversity(moments: GradientMoments) -> Tensor:
    share = moments.weight_sq_sum / moments.unit_size
    trace, _ = moments.trace_and_norm()
    return share * (trace * (1 - share) / moments.grad_sq_norm + 1)


_BY_MOMENTS: Mapping[str, Callable[[GradientMoments], Tensor]] = {
    "norm_test": _norm_test,
    "gradient_diversity": _gradient_diversity,
}


def call_fault(record: StepRecord, *, fewest: int = 2) -> str:
    """Why the layers' calls tell nothing of this step, if so."""
    if record.faults or not record.passes:
        return record.faults[0] if record.faults else UNSEEN
    if any(not p.num_examples for p in record.passes):
        return "the model's input has no tensor with a batch axis"
    faults = [f for p in record.passes for f in (*p.faults, *p.unread.values())]
    if faults or not all(p.read for p in record.passes):
        return faults[0] if faults else "no layer's call was captured in this step"
    if record.num_examples < fewest:
        return f"a variance needs 2 examples per step, got {record.num_examples}"
    return ""


def of_signal(name: str, record: StepRecord, share: Number) -> str | Found:
    """Return what follows from the ratios of squared mean to variance."""
    if record.signal is None:
        return "the second moments were not read"
    sums = torch.cat((record.signal.sum(1, keepdim=True), record.signal), 1)
    ratio = sums[0] / sums[1]
    if name == "evidence_stopping":
        return {name: StepQuantity(1 - ratio / share)}
    n = 1 / share
    debiased = ratio * ((n - 3) / (n - 1)) - share
    return {"gsnr": StepQuantity(ratio), "debiased_gsnr": StepQuantity(debiased)}


def of_products(name: str, record: StepRecord, share: Number) -> StepQuantity | str:
    """Return what follows from inner products with the step's gradient."""
    if len(record.passes) > 1:
        return (
            "the step's gradient is known only after its last micro-batch, when the "
            "examples of earlier ones are gone"
        )
    only = record.passes[0]
    gathered = only.gathered.products
    assert record.gradient is not None
    count = len(record.gradient)
    nothing = torch.zeros_like(next(iter(gathered.values())))
    products = torch.stack([gathered.get(i, nothing) for i in range(count)])
    products = torch.cat((products.sum(0, keepdim=True), products))
    if name == "inner_product_test":
        return StepQuantity(inner_product_statistic(products, share))
    sums = torch.stack([only.sq_norms.get(i, nothing).sum() for i in range(count)])
    sums = torch.cat((sums.sum(0, keepdim=True), sums))
    return StepQuantity(orthogonality_statistic(sums, products, share))


def position_sums(record: StepRecord, like: Tensor) -> Tensor | str:
    """Return the convolutions' second moments, positions apart, of all passes."""
    fault = call_fault(record, fewest=1)  # other ranks may have more
    if fault:
        return fault
    sums = torch.zeros_like(like)
    for forward_pass in record.passes:
        for index, own in forward_pass.gathered.position_sums.items():
            sums[index] += own.to(sums.dtype)
    return sums
