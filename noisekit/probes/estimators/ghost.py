"""Noise of a model that couples its examples: real forwards on parts of the batch.

BatchNorm in training mode makes an example's gradient depend on its batch. What does
exist is the gradient of a *ghost batch* of ``b`` examples, normalised by its own
statistics, and its noise, which belongs to that size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.errors import BatchSizeError, ModelCopyError, UsageError
from noisekit.core.layers.rule import widen
from noisekit.core.model_copies import copied_parameters, copy_module, copy_value
from noisekit.core.randomness import preserve_rng_state
from noisekit.core.reductions import sq_norms
from noisekit.core.results import Unavailable
from noisekit.core.risk import LossFn
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.hooks import suspend_recording
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_weights import LossReduction
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.norm_layers import unit_trace
from noisekit.probes.estimators.step_inputs import StepInputs

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model was called with."""


class Ghost(NoiseEstimator):
    """Gradients of replayed parts of the batch, at the weights of the step."""

    name = "ghost"
    settings = ("ghost_batch",)
    reads_coupled = True

    def __init__(self, *, ghost_batch: int | None) -> None:
        """Replay parts of ``ghost_batch`` examples."""
        self._size = ghost_batch

    def set_up(self, context: ProbeContext) -> None:
        """Check that the loss and the size are known.

        Raises:
            UsageError: If they are not.
        """
        if context.loss_fn is None or self._size is None:
            raise UsageError(
                "estimator='ghost' replays parts of the batch, so that it needs "
                f"loss_fn= and ghost_batch=, got loss_fn={context.loss_fn!r}, "
                f"ghost_batch={self._size}."
            )
        self._loss_fn: LossFn = context.loss_fn
        self._loss_reduction = context.loss_reduction

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the model's inputs."""
        recorder.wanted.inputs = True

    def on_loss(self, recorder: Recorder, targets: Any) -> None:
        """Replay the pass that the loss is being computed of, if it is to be read."""
        active = recorder.active
        if active is None or active.inputs is None or active.num_examples is None:
            return
        assert self._size is not None
        try:
            # Its own model, which may write to all that it holds, runs once a step.
            model = copy_module(recorder.model)
            parameters = copied_parameters(recorder.model, model, recorder.parameters)
            with suspend_recording(), preserve_rng_state(), torch.enable_grad():
                active.ghost = _ghost_moments(
                    model,
                    self._loss_fn,
                    (copy_value(active.inputs), targets),
                    weights=active.weights,
                    parameters=parameters,
                    ghost_batch=self._size,
                    batch_size=active.num_examples,
                    batch_dim=recorder.batch_dim,
                    loss_reduction=self._loss_reduction,
                )
        except (BatchSizeError, ModelCopyError) as error:
            active.ghost_faults.append(str(error))

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the moments over the ghost batches of all micro-batches."""
        passes = step.passes
        faults = [fault for p in passes for fault in p.ghost_faults]
        ghosts = [p.ghost for p in passes if p.ghost is not None]
        if not faults and len(ghosts) < len(passes):
            faults = ["the loss was not called through probe.loss_fn"]
        if faults:
            return Unavailable(faults[0])
        note = None
        if len(ghosts) > 1:
            note = f"averaged over {len(ghosts)} micro-batches"
        return StepNoise(
            self.name,
            f"{self.name}({self._size})",
            dict.fromkeys(step.methods, f"ghost batches of {self._size}"),
            _averaged(ghosts),
            note=note,
            averaged=True,
        )


def _averaged(parts: Sequence[GradientMoments]) -> GradientMoments:
    """Moments whose ``tr Σ`` and ``|G|²`` are the averages over parts, by their units.

    Unlike ``merge`` this needs no gradient of all parts together.
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(part.num_units for part in parts)
    shares = [part.num_units / total for part in parts]
    size = sum(s * part.unit_size for s, part in zip(shares, parts, strict=True))
    own = [unit_trace(part) for part in parts]  # per unit
    traces = [
        trace * (part.unit_size / size) for part, trace in zip(parts, own, strict=True)
    ]
    norms = [
        part.grad_sq_norm - part.weight_sq_sum * trace
        for part, trace in zip(parts, own, strict=True)
    ]
    trace, norm, mean_fourth = (
        torch.stack([s * v for s, v in zip(shares, values, strict=True)]).sum()
        for values in (traces, norms, [part.mean_fourth for part in parts])
    )
    a = sum(s * part.weight_sq_sum for s, part in zip(shares, parts, strict=True))
    q = norm + a * trace
    mean_sq = q + (1 - a) * trace
    return replace(
        parts[0],
        num_units=total,
        unit_size=size,
        weight_sq_sum=a,
        sum_sq_norm=mean_sq * a,
        sum_fourth=mean_fourth * a**3,
        grad_sq_norm=q,
    )


def _ghost_moments(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Inputs, Any],
    *,
    weights: Tensor | None,
    parameters: Sequence[nn.Parameter],
    ghost_batch: int,
    batch_size: int,
    batch_dim: int,
    loss_reduction: LossReduction,
) -> GradientMoments:
    """The moments over ghost batches.

    Examples beyond the last whole ghost batch are not used.
    """
    inputs, targets = batch
    num_ghosts = batch_size // ghost_batch
    if num_ghosts < 2:
        raise BatchSizeError(
            f"noise of ghost batches needs two of {ghost_batch} examples, got a batch "
            f"of {batch_size}; use a ghost_batch of at most {max(1, batch_size // 2)}."
        )
    shares = _Shares.of(weights, num_ghosts, ghost_batch, loss_reduction)
    norms = []
    total: list[Tensor] = []
    for k in range(num_ghosts):
        rows = (k * ghost_batch, ghost_batch)
        args, kwargs = narrow(inputs, batch_size, batch_dim, rows)
        chosen = narrow(targets, batch_size, 0, rows)
        loss = loss_fn(model(*args, **kwargs), chosen)
        grads = torch.autograd.grad(
            loss, list(parameters), allow_unused=True, materialize_grads=True
        )
        norms.append(shares.sq_norm(k, grads))
        total = total or [torch.zeros_like(grad) for grad in grads]
        shares.add(k, grads, to=total)
    sq_norms = torch.stack(norms) * shares.scale**2
    return GradientMoments(
        num_ghosts,
        shares.unit_size,
        shares.sq_sum,
        sq_norms.sum(),
        sq_norms.square().sum(),
        _sq_norm(total) * shares.scale**2,
    )


@dataclass(frozen=True, slots=True)
class _Shares:
    """What each ghost batch weighs in the mean of all, and what its gradient is worth.

    Attributes:
        scale: What every ghost batch's gradient is multiplied by.
        factors: What each is multiplied by beside that ``(K,)``; zero where a ghost
            batch has no example that counts. ``None`` where all weigh alike.
        sq_sum: ``sum v_k²`` of the weights ``v_k``.
        unit_size: Effective examples of one.
    """

    scale: float
    factors: Tensor | None
    sq_sum: Tensor | float
    unit_size: Tensor | float

    @classmethod
    def of(
        cls,
        weights: Tensor | None,
        num_ghosts: int,
        ghost_batch: int,
        loss_reduction: LossReduction,
    ) -> "_Shares":
        """Return the shares, given what each example of the batch counts."""
        if weights is None:
            divisor = num_ghosts * (ghost_batch if loss_reduction == "sum" else 1)
            return cls(1 / divisor, None, 1 / num_ghosts, ghost_batch)
        used = weights[: num_ghosts * ghost_batch].view(num_ghosts, ghost_batch)
        counts = used.sum(1)
        total, squares = counts.sum(), counts.square().sum()
        of_one = counts if loss_reduction == "mean" else (counts > 0).to(counts.dtype)
        size = squares / used.square().sum()
        return cls(1.0, of_one / total, squares / total**2, size)

    def sq_norm(self, k: int, grads: Sequence[Tensor]) -> Tensor:
        """Return ``|u_k|²`` from the gradient of ghost batch ``k``, up to ``scale``."""
        sq_norm = _sq_norm(grads)
        if self.factors is None:
            return sq_norm
        factor = self.factors[k]
        # The mean over no example at all is not a number.
        return torch.where(factor > 0, sq_norm * factor.square(), 0.0)

    def add(self, k: int, grads: Sequence[Tensor], *, to: Sequence[Tensor]) -> None:
        """Add ``u_k`` to a sum, up to ``scale``."""
        if self.factors is None:
            torch._foreach_add_(list(to), list(grads))
            return
        factor = self.factors[k]
        for total, grad in zip(to, grads, strict=True):
            total.addcmul_(torch.where(factor > 0, grad, 0.0), factor.to(grad.dtype))


def narrow(
    tree: Any, batch_size: int, batch_dim: int, rows: tuple[int, int]
) -> Any:  # a nest of tensors, as it came
    """Cut every tensor that runs over the examples to ``rows`` (start, length)."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() > batch_dim and tensor.shape[batch_dim] == batch_size:
            return tensor.narrow(batch_dim, *rows)
        return tensor

    return pytree.tree_map_only(Tensor, cut, tree)


def _sq_norm(tensors: Sequence[Tensor]) -> Tensor:
    return sq_norms([widen(tensor) for tensor in tensors]).sum()
