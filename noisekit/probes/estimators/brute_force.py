"""Estimators' units by one backward pass per example, and as a probe reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.layers.chunks import chunk_slices
from noisekit.core.normalisation import normaliser_value
from noisekit.core.params import ParameterPatterns, flatten
from noisekit.core.risk import EmpiricalRisk
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.signed_backward import SignedBackward
from noisekit.probes.capture.step_record import ForwardPass
from noisekit.probes.dataset_noise import only_pass, recording
from noisekit.probes.estimators.choice import EstimatorOptions

_CHUNKS, _PARTS = 3, 2


@dataclass(frozen=True, slots=True)
class UnitSqNorms:
    """Squared norms of the units that estimators see, of one batch.

    Attributes:
        examples: By parameter, of each example's contribution ``(N,)``.
        estimators: By estimator, of its units' contributions in total.
        coverage: How each parameter was read.
    """

    examples: Mapping[str, Tensor]
    estimators: Mapping[str, Tensor]
    coverage: Mapping[str, str]


def read_by_probe(
    risk: EmpiricalRisk, batch: Batch, params: ParameterPatterns
) -> UnitSqNorms:
    """Return what a probe's hooks read of one batch at frozen weights."""
    scale = float(risk.num_examples) ** 2
    with recording(risk, params) as recorder:
        options = EstimatorOptions(num_chunks=_CHUNKS)
        recorder.units.request = options.request({"per_example", "rows", "chunks"})
        recorder.signed = SignedBackward(
            risk.model,
            recorder.parameters,
            recorder,
            generator=_generator(),
            batch_dim=0,
        )
        recorder.signed.num_signs = 1
        _weighted_loss(risk, batch).backward()  # type: ignore[no-untyped-call]
        whole = only_pass(recorder)
        recorder.signed.num_signs = 0
        coverage = recorder.plan.coverage()
        unused = torch.zeros_like(next(iter(whole.sq_norms.values())))
        examples = {
            name: whole.sq_norms.get(index, unused) * scale
            for index, name in enumerate(recorder.names)
        }
        found = {
            "rows": _total(whole.row_norms),
            "chunks": _total(whole.chunk_norms),
        }
        if whole.signed_norms:
            found["random_signs"] = whole.signed_norms[0].sum().reshape(1)
        found["accumulation"] = _micro_batches(risk, batch, recorder)
    return UnitSqNorms(
        examples, {name: norms * scale for name, norms in found.items()}, coverage
    )


def _micro_batches(risk: EmpiricalRisk, batch: Batch, recorder: Recorder) -> Tensor:
    """Squared norms of two micro-batches, the second of which is accumulated."""
    for parameter in recorder.parameters:
        parameter.grad = None
    recorder.own_gradients.want(True)
    for rows in _parts(batch):
        part = take_examples(batch, torch.arange(rows.start, rows.stop))
        _weighted_loss(risk, part).backward()  # type: ignore[no-untyped-call]
    passes = recorder.take(stepped=False).passes
    return torch.stack([_own(forward_pass) for forward_pass in passes])


def read_one_by_one(risk: EmpiricalRisk, batch: Batch) -> UnitSqNorms:
    """Return the same from one backward pass per example."""
    count = count_examples(batch)
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    rows = rows[: max(1, round(EstimatorOptions().row_share * count))].sort().values
    signs = 2 * torch.randint(2, (count,), generator=_generator()) - 1
    cuts = {"chunks": chunk_slices(count, _CHUNKS), "accumulation": _parts(batch)}
    sums: dict[str, list[Tensor]] = {"random_signs": [torch.zeros(())]}
    sums |= {name: [torch.zeros(()) for _ in cut] for name, cut in cuts.items()}
    columns: list[list[Tensor]] = []
    with risk.evaluating():
        for i in range(count):
            loss = _weighted_loss(risk, _example(batch, i, count))
            grads = [g.double() * risk.num_examples for g in risk.gradients(loss)]
            columns.append([grad.square().sum() for grad in grads])
            whole = flatten(grads)
            sums["random_signs"][0] = sums["random_signs"][0] + signs[i] * whole
            for name, cut in cuts.items():
                own = next(k for k, part in enumerate(cut) if i < part.stop)
                sums[name][own] = sums[name][own] + whole
    examples = [torch.stack(column) for column in zip(*columns, strict=True)]
    found = {
        name: torch.stack([total.square().sum() for total in totals])
        for name, totals in sums.items()
    }
    found["rows"] = torch.stack(examples).sum(0)[rows]
    return UnitSqNorms(dict(zip(risk.layout.names, examples, strict=True)), found, {})


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _parts(batch: Batch) -> tuple[slice, ...]:
    """The batch as two micro-batches."""
    return chunk_slices(count_examples(batch), _PARTS)


def _weighted_loss(risk: EmpiricalRisk, batch: Batch) -> Tensor:
    """The part of the risk that these examples make up."""
    counted = 1.0
    if risk.reduction == "mean":
        counted = normaliser_value(batch, risk.normaliser)
    return risk.loss_of(batch) * (counted / risk.total)


def _total(found: Mapping[int, Tensor]) -> Tensor:
    return torch.stack(list(found.values())).sum(0)


def _own(forward_pass: ForwardPass) -> Tensor:
    return torch.cat([norms for _, norms in forward_pass.own_norms]).sum()


def _example(batch: Batch, index: int, count: int) -> Batch:
    def row(tensor: Tensor) -> Tensor:
        whole = tensor.dim() > 0 and tensor.shape[0] == count
        return tensor[index : index + 1] if whole else tensor

    example: Any = pytree.tree_map_only(Tensor, row, batch)
    return example[0], example[1]
