"""What each estimator says of one step's noise, or why it says nothing."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from noisekit.probes.capture.step_record import UNSEEN, ForwardPass
from noisekit.probes.capture.step_weights import Number, sq_sum
from noisekit.probes.estimators.indirect import (
    ghost,
    norm_layers,
    preconditioned,
    random_signs,
)
from noisekit.probes.estimators.step_inputs import Evidence, StepNoise, call_fault


def noise_of(name: str, evidence: Evidence) -> StepNoise | str:
    """Return what the estimator ``name`` says, or the reason why it says nothing."""
    record = evidence.record
    if record.faults:
        return record.faults[0]
    if not record.passes:
        return UNSEEN
    if any(p.num_examples is None for p in record.passes):
        return "the model's input has no tensor with a batch axis"
    return _WAYS[name](evidence)


def _per_example(evidence: Evidence) -> StepNoise | str:
    fault = call_fault(evidence, lambda p: p.sq_norms)
    if fault:
        return fault
    tables = [evidence.table(p.sq_norms) for p in evidence.passes]
    weights = evidence.weights
    moments, layers = evidence.units(tables, weights.example_sq_sum)
    own = [
        _own_sq_norms(table.sum(0), share)
        for table, share in zip(tables, weights.of_examples(), strict=True)
    ]
    return StepNoise(
        "per_example",
        "per_example",
        evidence.coverage,
        moments,
        layers,
        weights.note,
        own[0] if len(own) == 1 else torch.cat(own),
    )


def _own_sq_norms(contributions: Tensor, share: Number) -> Tensor:
    """``|g_i|²`` from ``|u_i|²``; zero for examples that the loss does not count."""
    if not isinstance(share, Tensor):
        return contributions / share**2
    return torch.where(share > 0, contributions / share.square(), 0.0)


def _rows(evidence: Evidence) -> StepNoise | str:
    fault = call_fault(evidence, lambda p: p.row_norms)
    if fault:
        return fault
    tables = [evidence.table(p.row_norms) for p in evidence.passes]
    sizes = evidence.weights.sizes
    read = [n / table.shape[1] for n, table in zip(sizes, tables, strict=True)]
    moments, layers = evidence.units(tables, evidence.weights.example_sq_sum, read=read)
    of = f"{moments.num_read} of {moments.num_units} rows"
    methods = {name: f"{way}, {of}" for name, way in evidence.coverage.items()}
    return StepNoise("rows", "rows", methods, moments, layers, evidence.weights.note)


def _chunks(evidence: Evidence) -> StepNoise | str:
    fault = call_fault(evidence, lambda p: p.chunk_norms)
    if fault:
        return fault
    tables = [evidence.table(p.chunk_norms) for p in evidence.passes]
    units = evidence.weights.of_chunks(evidence.options.num_chunks)
    moments, layers = evidence.units(tables, sq_sum(units))
    methods = {
        name: f"{way}, {len(units)} chunks" for name, way in evidence.coverage.items()
    }
    label = _sized("chunks", evidence, len(units))
    return StepNoise("chunks", label, methods, moments, layers, evidence.weights.note)


def _accumulation(evidence: Evidence) -> StepNoise | str:
    passes = evidence.passes
    faults = [fault for p in passes for fault in p.own_faults]
    if faults:
        return faults[0]
    if len(passes) * evidence.num_ranks < 2:
        reasons = [fault for p in passes for fault in (*p.faults, *p.unread.values())]
        needs = f"noise of micro-batches needs 2 in a step, got {len(passes)}"
        return f"{reasons[0]}, and {needs}" if reasons else needs
    seen = [[index for indices, _ in p.own_norms for index in indices] for p in passes]
    if not all(seen):
        return "a micro-batch's own gradient was not seen"
    if any(len(set(indices)) < len(indices) for indices in seen):
        return "two backward passes went through one forward pass"
    vectors = [_vector(p, evidence.gradient) for p in passes]
    table = torch.stack(vectors, 1) * evidence.scale
    weights = evidence.weights.of_microbatches()
    moments, layers = evidence.units([table], sq_sum(weights))
    label = _sized("accumulation", evidence, len(passes))
    size = label.partition("(")[2].rstrip(")")
    methods = dict.fromkeys(evidence.coverage, f"micro-batches of {size}")
    note = evidence.weights.note
    return StepNoise("accumulation", label, methods, moments, layers, note)


def _vector(forward_pass: ForwardPass, like: Tensor) -> Tensor:
    """Squared norms of a micro-batch's own gradient, one per parameter."""
    if len(forward_pass.own_norms) == 1:
        indices, norms = forward_pass.own_norms[0]
        if len(indices) == len(like):
            order = [indices.index(i) for i in range(len(indices))]
            in_order = order == list(range(len(order)))
            return (norms if in_order else norms[order]).to(like.dtype)
    indices = tuple(i for found, _ in forward_pass.own_norms for i in found)
    norms = torch.cat([norms for _, norms in forward_pass.own_norms])
    where = torch.tensor(indices, device=like.device)
    return torch.zeros_like(like).index_copy_(0, where, norms.to(like.dtype))


def _ranks(evidence: Evidence) -> StepNoise | str:
    passes = evidence.passes
    if evidence.num_ranks < 2:
        return "this process trains alone: there are no ranks to compare"
    if len(passes) > 1:
        return (
            "a rank's own gradient is not seen where it accumulates micro-batches; "
            "estimator='accumulation' takes those of all ranks"
        )
    faults = passes[0].own_faults
    if faults or not passes[0].own_norms:
        return faults[0] if faults else "the rank's own gradient was not seen"
    table = _vector(passes[0], evidence.gradient)[:, None] * evidence.scale
    moments, layers = evidence.units([table], 1.0)
    label = _sized("ranks", evidence, 1)
    methods = dict.fromkeys(evidence.coverage, f"{evidence.num_ranks} ranks")
    return StepNoise("ranks", label, methods, moments, layers)


def _sized(name: str, evidence: Evidence, num_units: int) -> str:
    """The name with the examples of one unit, on average."""
    return f"{name}({evidence.record.num_examples / num_units:g})"


_WAYS: Mapping[str, Callable[[Evidence], StepNoise | str]] = {
    "per_example": _per_example,
    "rows": _rows,
    "chunks": _chunks,
    "accumulation": _accumulation,
    "ranks": _ranks,
    "random_signs": random_signs,
    "norm_layers": norm_layers,
    "ghost": ghost,
    "preconditioned": preconditioned,
}
