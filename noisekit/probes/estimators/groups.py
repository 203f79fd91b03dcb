"""Noise from gradients of groups of examples: chunks, micro-batches, ranks.

With the gradient ``c_k`` of each of ``K`` groups of ``b`` examples, ``tr Σ`` is ``b``
times the variance of ``c_k``. Only chunks need the layers' calls; the others compare
gradients that the loop computes anyway, whatever the model.
"""

import torch
from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import ForwardPass
from noisekit.probes.capture.step_weights import sq_sum
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs


class Chunks(NoiseEstimator):
    """Gradients of a few equal parts of every micro-batch."""

    name = "chunks"
    reads_calls = True
    settings = ("num_chunks",)

    def __init__(self, *, num_chunks: int) -> None:
        """Divide every micro-batch into ``num_chunks``."""
        self._num_chunks = num_chunks

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the norms of the chunks' sums."""
        recorder.wanted.examples = True
        recorder.units.request.num_chunks = self._num_chunks

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the moments over the chunks."""
        fault = step.call_fault(lambda p: p.chunk_norms)
        if fault:
            return fault
        tables = [step.table(p.chunk_norms) for p in step.passes]
        units, unread = step.weights.of_chunks(self._num_chunks), step.unread
        moments, layers = step.units(tables, sq_sum(units), without=unread)
        methods = {
            name: f"{way}, {len(units)} chunks" for name, way in step.methods.items()
        }
        label, note = _sized(self.name, step, len(units)), step.weights.note
        return StepNoise(self.name, label, methods, moments, layers, note, None, unread)


class Accumulation(NoiseEstimator):
    """The gradients of a step's micro-batches, as accumulation brings them."""

    name = "accumulation"
    reads_coupled = True

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the norm of each micro-batch's own gradient."""
        recorder.own_gradients.want(True)

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the moments over the micro-batches."""
        passes = step.passes
        fault = _microbatch_fault(step)
        if fault:
            return Unavailable(fault)
        vectors = [_vector(p, step.gradient) for p in passes]
        table = torch.stack(vectors, 1) * step.scale  # (Q, K)
        weights = step.weights.of_microbatches()
        moments, layers = step.units([table], sq_sum(weights))
        label = _sized(self.name, step, len(passes))
        size = label.partition("(")[2].rstrip(")")
        methods = dict.fromkeys(step.methods, f"micro-batches of {size}")
        return StepNoise(self.name, label, methods, moments, layers, step.weights.note)


def _microbatch_fault(step: StepInputs) -> str:
    """Why the micro-batches cannot be compared, if so."""
    passes = step.passes
    faults = [fault for p in passes for fault in p.own_faults]
    if faults:
        return faults[0]
    if len(passes) * step.num_ranks < 2:
        reasons = [fault for p in passes for fault in p.faults]
        needs = f"noise of micro-batches needs 2 in a step, got {len(passes)}"
        return f"{reasons[0]}, and {needs}" if reasons else needs
    seen = [[index for indices, _ in p.own_norms for index in indices] for p in passes]
    if not all(seen):
        return "a micro-batch's own gradient was not seen"
    if any(len(set(indices)) < len(indices) for indices in seen):
        return "two backward passes went through one forward pass"
    return ""


class Ranks(NoiseEstimator):
    """The ranks' own gradients under data parallelism, before they are averaged."""

    name = "ranks"
    reads_coupled = True

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the norm of this rank's own gradient."""
        recorder.own_gradients.want(True)

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return this rank's part of the moments over the ranks."""
        passes = step.passes
        if step.num_ranks < 2:
            return Unavailable(
                "this process trains alone: there are no ranks to compare"
            )
        if len(passes) > 1:
            return Unavailable(
                "a rank's own gradient is not seen where it accumulates micro-batches; "
                "estimator='accumulation' takes those of all ranks"
            )
        faults = passes[0].own_faults
        if faults or not passes[0].own_norms:
            return Unavailable([*faults, "the rank's own gradient was not seen"][0])
        table = _vector(passes[0], step.gradient)[:, None] * step.scale  # (Q, 1)
        moments, layers = step.units([table], 1.0)
        methods = dict.fromkeys(step.methods, f"{step.num_ranks} ranks")
        return StepNoise(
            self.name, _sized(self.name, step, 1), methods, moments, layers
        )


def _vector(forward_pass: ForwardPass, like: Tensor) -> Tensor:
    """Squared norms of a micro-batch's own gradient, one per parameter ``(Q,)``."""
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


def _sized(name: str, step: StepInputs, num_units: int) -> str:
    """The name with the examples of one unit, on average."""
    return f"{name}({step.record.num_examples / num_units:g})"
