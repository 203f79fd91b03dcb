"""Noise of a model that couples its examples: real forwards on parts of the batch.

BatchNorm in training mode makes an example's gradient depend on its batch. What does
exist is the gradient of a *ghost batch* of ``b`` examples, normalised by its own
statistics, and its noise, which belongs to that size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.errors import BatchSizeError
from noisekit.core.layers.rule import widen
from noisekit.core.model_state import preserve_model_state
from noisekit.core.reductions import sq_norms
from noisekit.core.risk import LossFn
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.hooks import is_suspended, suspend_recording
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import ForwardPass
from noisekit.probes.estimators.assembly import LossReduction

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model was called with."""


class GhostReplay:
    """Replays parts of a training batch, at the weights that its step starts from."""

    def __init__(
        self,
        recorder: Recorder,
        loss_fn: LossFn,
        ghost_batch: int,
        loss_reduction: LossReduction,
    ) -> None:
        self._recorder = recorder
        self._loss_fn = loss_fn
        self._ghost_batch = ghost_batch
        self._loss_reduction = loss_reduction

    def observe(self, targets: Any) -> None:  # whatever the loss takes
        """Replay the pass that the loss is being computed of, if it is to be read."""
        active = self._recorder.active
        if is_suspended(self._recorder) or not torch.is_grad_enabled():
            return
        if active is None or active.inputs is None:
            return
        try:
            active.ghost = self.moments(active, targets)
        except BatchSizeError as error:
            active.ghost_faults.append(str(error))
        active.inputs = None

    def moments(self, forward_pass: ForwardPass, targets: Any) -> GradientMoments:
        """Return the moments over ghost batches of one pass.

        Raises:
            BatchSizeError: If the batch has no two ghost batches.
        """
        assert forward_pass.inputs is not None
        assert forward_pass.num_examples is not None
        with suspend_recording():
            return _ghost_moments(
                self._recorder.model,
                self._loss_fn,
                (forward_pass.inputs, targets),
                weights=forward_pass.weights,
                parameters=self._recorder.parameters,
                ghost_batch=self._ghost_batch,
                batch_size=forward_pass.num_examples,
                batch_dim=self._recorder.batch_dim,
                loss_reduction=self._loss_reduction,
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
    """The model is given back with buffers, gradients and random state bit for bit.

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
    with preserve_model_state(model), torch.enable_grad():
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
