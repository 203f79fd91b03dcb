"""Gradient noise at frozen weights: every example of a data set, in its own terms."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import CoupledExamplesError, LayerReadError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.noise.scale import per_example_noise_scale
from noisekit.probes.capture.hooks import suspend_recording
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import ForwardPass
from noisekit.probes.capture.tokens import TokenCounts
from noisekit.probes.dataset_tokens import sequence_shares
from noisekit.probes.options import Unit


@dataclass(frozen=True, slots=True)
class GradientNoise:
    """Gradient noise of a data set at frozen weights.

    Attributes:
        grad_sq_norm: ``|∇F|²`` of the whole data set [loss²/param²].
        variance_trace: ``tr Σ`` over its examples [loss²/param²].
        debiased_grad_sq_norm: ``|G|²`` of what the data are a sample of; may be
            negative [loss²/param²].
        simple_noise_scale: ``tr Σ / |G|²`` [examples, or tokens].
        example_sq_norms: ``|g_i|²`` per example, in the order of the batches.
        coverage: How each parameter was read.
        num_examples: Examples in the data set.
    """

    grad_sq_norm: Estimate
    variance_trace: Estimate
    debiased_grad_sq_norm: Estimate
    simple_noise_scale: Estimate
    example_sq_norms: Tensor = field(repr=False)
    coverage: Mapping[str, str] = field(repr=False)
    num_examples: int

    def __str__(self) -> str:
        """Write the noise scale and its parts, a line each."""
        return "\n".join(
            [
                f"gradient noise of {self.num_examples} examples:",
                f"  simple noise scale: {self.simple_noise_scale}",
                f"  tr Σ: {self.variance_trace}",
                f"  |G|²: {self.debiased_grad_sq_norm}",
            ]
        )


@checked
def gradient_noise(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    unit: Unit = "example",
    tokens: TokenCounts | None = None,
) -> GradientNoise:
    """Return the gradient noise of a data set at frozen weights, with sharp errors.

    Two passes over the data: norms of every example's gradient, then their inner
    products with the mean gradient, which make the jackknife over examples exact.
    ``g_i`` is the number of examples times example i's part of the risk's gradient.

    Args:
        model: Left as it was; or an ``EmpiricalRisk`` in place of all three.
        loss_fn: Called with outputs and targets; returns a scalar.
        batches: Yields ``(inputs, targets)``.
        bn: BatchNorm policy; ``"batch"`` couples the examples and is refused.
        normaliser: What the loss of a batch is divided by, given its targets.
        params: Names or patterns of the parameters to measure; all by default.
        unit: As for ``attach``: with ``"token"`` the noise scale is counted in tokens,
            and ``tr Σ`` is of the sequences but for how their lengths vary, which a
            mean over tokens does not see.
        tokens: With ``unit="token"`` and a loss other than PyTorch's cross-entropy:
            given a batch's targets, how many tokens count in each sequence.

    Raises:
        CoupledExamplesError: If examples have no gradients of their own.
        BatchSizeError: If there are fewer than 3 examples.
        LayerReadError: If some parameter's gradients cannot be told apart.
        UsageError: If it is not known which tokens count.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> noise = nk.gradient_noise(model, loss_fn, batches * 50)
        >>> round(float(noise.grad_sq_norm), 4), round(float(noise.variance_trace), 2)
        (17.0, 17.17)
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    with recording(risk) as recorder:
        sq_norms = torch.cat(list(_example_sq_norms(risk, recorder)))
        names, parameters = recorder.names, recorder.parameters
        gradient = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in zip(names, parameters, strict=True)
        }
        inner = torch.cat(list(_inner_products(risk, recorder, gradient)))
        coverage = recorder.plan.coverage()
    total = torch.stack([g.double().square().sum() for g in gradient.values()]).sum()
    counted, own = 1.0, (sq_norms, inner)
    if unit == "token":
        lengths = sequence_shares(risk, tokens)
        counted, own = lengths.per_sequence, lengths.of_a_ratio(*own, total)
    noise = per_example_noise_scale(*own, counted=counted)
    return GradientNoise(
        Estimate(float(total), num_grads=2 * risk.num_batches),
        noise.variance_trace,
        noise.debiased_grad_sq_norm,
        noise.simple_noise_scale,
        sq_norms,
        coverage,
        len(sq_norms),
    )


@checked
def example_sq_norms(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> Tensor:
    """Return ``|g_i|²`` of every example at frozen weights, in the batches' order.

    ``g_i`` is the number of examples times example i's part of the risk's gradient:
    for a mean or a sum over examples, its own gradient [loss²/param²].

    Raises:
        CoupledExamplesError: If examples have no gradients of their own.
        LayerReadError: If some parameter's gradients cannot be told apart.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> nk.example_sq_norms(model, loss_fn, batches)  # |(2, 0)|² and |(0, 8)|²
        tensor([ 4., 64.])
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    with recording(risk) as recorder:
        return torch.cat(list(_example_sq_norms(risk, recorder)))


@contextmanager
def recording(risk: EmpiricalRisk) -> Iterator[Recorder]:
    """Yield a recorder whose sites account for the first batch's gradient.

    Raises:
        CoupledExamplesError: If examples have no gradients of their own.
    """
    if risk.bn == "batch":
        raise CoupledExamplesError(
            "gradients of single examples need BatchNorm's running statistics, got "
            "bn='batch', which couples the examples; use bn='running' or "
            "'recalibrated'."
        )
    named = dict(zip(risk.layout.names, risk.parameters, strict=True))
    recorder = Recorder(risk.model, named)
    try:
        with suspend_recording(recorder), risk.evaluating():
            _settle(risk, recorder)
            yield recorder
    finally:
        recorder.remove()


def _settle(risk: EmpiricalRisk, recorder: Recorder) -> None:
    """Run the first batch until every parameter is read where it can be."""
    while True:
        _clear(recorder)
        _, batch = next(iter(risk.weighted_batches()))
        risk.loss_of(batch).backward()  # type: ignore[no-untyped-call]
        recorder.take()
        if not recorder.plan.stale:
            break
    recorder.wanted.closure = False
    _clear(recorder)


def _clear(recorder: Recorder) -> None:
    for parameter in recorder.model.parameters():
        parameter.grad = None


def _example_sq_norms(risk: EmpiricalRisk, recorder: Recorder) -> Iterator[Tensor]:
    """Yield ``|g_i|²`` per batch; the risk's gradient gathers in ``.grad``."""
    for weight, loss in risk.batch_losses():
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        forward_pass = only_pass(recorder)
        norms = torch.stack(list(forward_pass.sq_norms.values())).sum(0)
        yield norms * risk.num_examples**2


def _inner_products(
    risk: EmpiricalRisk, recorder: Recorder, gradient: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """Yield ``<g_i, ∇F>`` per batch."""
    recorder.wanted.tangents = gradient
    for weight, loss in risk.batch_losses():
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        forward_pass = only_pass(recorder)
        yield torch.stack(forward_pass.inner_products).sum(0) * risk.num_examples


def only_pass(recorder: Recorder) -> ForwardPass:
    """Return the one pass that a backward pass has gone through.

    Raises:
        LayerReadError: If there was another number, or it could not be read.
    """
    record = recorder.take(stepped=False)
    faults = [f for p in record.passes for f in (*p.faults, *p.unread.values())]
    if faults or len(record.passes) != 1 or not record.passes[0].sq_norms:
        reason = faults[0] if faults else "its own forward was not called once"
        raise LayerReadError(
            f"per-example gradients of this model cannot be told apart: {reason}; "
            "leave the parameters concerned out with params=."
        )
    return record.passes[0]
