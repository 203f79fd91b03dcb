"""The probe against brute force, one backward pass per example, on a user's model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.layers.chunks import chunk_slices
from noisekit.core.normalisation import Normaliser, normaliser_value
from noisekit.core.params import ParameterPatterns, flatten
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.signed_backward import SignedBackward
from noisekit.probes.capture.step_record import ForwardPass
from noisekit.probes.capture.unit_norms import UnitRequest
from noisekit.probes.dataset_noise import only_pass, recording

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF_TOLERANCE = 1e-1


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How far a probe's readings are from one backward pass per example.

    Attributes:
        errors: Largest error of per-example squared norms by parameter, relative to
            its largest one.
        estimators: By estimator, the largest error of its units' squared norms,
            relative to the largest one.
        tolerance: What rounding may explain at the parameters' precision.
        coverage: How each parameter was read.
        num_examples: Examples compared.
    """

    errors: Mapping[str, float] = field(repr=False)
    estimators: Mapping[str, float]
    tolerance: float
    coverage: Mapping[str, str] = field(repr=False)
    num_examples: int

    @property
    def passed(self) -> bool:
        """Whether every parameter and every estimator agrees."""
        found = (*self.errors.values(), *self.estimators.values())
        return all(error <= self.tolerance for error in found)

    def __str__(self) -> str:
        """Say it in one line, with the worst parameter or estimator."""
        named = {f"{n}, by {self.coverage[n]}": e for n, e in self.errors.items()}
        named |= {f"estimator {name}": e for name, e in self.estimators.items()}
        worst = max(named, key=lambda name: named[name])
        verdict = "agrees" if self.passed else "disagrees"
        return (
            f"the probe {verdict} with brute force on {self.num_examples} examples: "
            f"largest relative error {named[worst]:.1e} ({worst}; tolerance "
            f"{self.tolerance:.0e})"
        )


@checked
def self_check(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batch: Batch | None = None,
    *,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> SelfCheck:
    """Compare the probe with one backward pass per example.

    Per-example norms by parameter, and the units of a random subset of rows, of
    chunks, of micro-batches and of random signs. All at frozen weights and without
    dropout; the model is given back.

    Args:
        model: Any model whose examples are not coupled; or an ``EmpiricalRisk`` in
            place of all three, whose first batch is taken.
        loss_fn: Its loss, a mean or a sum over examples.
        batch: ``(inputs, targets)``; a few examples suffice.
        bn: BatchNorm policy; ``"batch"`` couples the examples and is refused.
        normaliser: What the loss of a batch is divided by, given its targets.
        params: Names or patterns of the parameters to check; all by default.

    Raises:
        CoupledExamplesError: If examples have no gradients of their own.
        LayerReadError: If some parameter's gradients cannot be told apart.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> nk.self_check(model, loss_fn, batches[0]).passed
        True
    """
    batches = None if batch is None else [batch]
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    _, batch = next(iter(risk.weighted_batches()))
    found, expected = _read_by_probe(risk, batch), _read_one_by_one(risk, batch)
    return SelfCheck(
        _errors(found.examples, expected.examples),
        _errors(found.estimators, expected.estimators),
        _TOLERANCES.get(risk.layout.dtype, _HALF_TOLERANCE),
        found.coverage,
        count_examples(batch),
    )


def _errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    overall = torch.stack([norms.abs().max() for norms in expected.values()]).max()
    return {
        name: _relative_error(found[name], norms, overall)
        for name, norms in expected.items()
    }


def _relative_error(found: Tensor, expected: Tensor, overall: Tensor) -> float:
    """Relative to the largest norm, or to what rounding leaves of a zero gradient."""
    dust = torch.finfo(found.dtype).eps ** 1.5 * overall
    largest = torch.maximum(expected.abs().max(), dust.to(expected.dtype))
    error = (found.to(expected) - expected).abs().max()
    return float(error / largest) if largest > 0 else float(error)


_CHUNKS, _PARTS, _ROW_SHARE = 3, 2, 0.25


@dataclass(frozen=True, slots=True)
class _UnitSqNorms:
    """Squared norms of the units that estimators see, of one batch.

    Attributes:
        examples: By parameter, of each example's contribution ``(N,)``.
        estimators: By estimator, of its units' contributions in total.
        coverage: How each parameter was read.
    """

    examples: Mapping[str, Tensor]
    estimators: Mapping[str, Tensor]
    coverage: Mapping[str, str]


def _read_by_probe(risk: EmpiricalRisk, batch: Batch) -> _UnitSqNorms:
    """Return what a probe's hooks read of one batch at frozen weights."""
    scale = float(risk.num_examples) ** 2
    with recording(risk) as recorder:
        recorder.units.request = UnitRequest(
            per_example=True, row_share=_ROW_SHARE, num_chunks=_CHUNKS
        )
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
    return _UnitSqNorms(
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


def _read_one_by_one(risk: EmpiricalRisk, batch: Batch) -> _UnitSqNorms:
    """Return the same from one backward pass per example."""
    count = count_examples(batch)
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    rows = rows[: max(1, round(_ROW_SHARE * count))].sort().values
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
    return _UnitSqNorms(dict(zip(risk.layout.names, examples, strict=True)), found, {})


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
