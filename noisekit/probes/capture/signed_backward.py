r"""Noise from one more backward pass, in which examples count with random signs.

With independent signs ``s_i = ±1``, ``|sum s_i u_i|²`` is an unbiased estimate of
``sum |u_i|²``: products of two different examples cancel on average. The sum is the
vector-Jacobian product of the model with its output gradient's rows times the signs.

Source:
    Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from noisekit.core.layers.rule import widen
from noisekit.core.randomness import stream
from noisekit.core.reductions import sq_norms
from noisekit.probes.capture.calls import tensors_of
from noisekit.probes.capture.hooks import (
    Faults,
    ModelHook,
    guarded,
    is_suspended,
    suspend_recording,
)
from noisekit.probes.capture.step_record import ForwardPass

KEPT_OUTPUTS = 4
"""Forward passes whose backward pass may still come; evaluations leave some too."""

_TWICE = "random signs need one backward pass through one output of the model"


class Owner(Protocol):
    """Who records: it may be suspended, and it knows the pass that is open."""

    faults: Faults

    @property
    def active(self) -> ForwardPass | None:
        """The last forward pass with gradients, also while it runs."""


class SignedBackward:
    r"""Backward passes of randomly signed examples, inside the training's own.

    With independent signs ``s_i`` of mean zero
    :math:`\mathbb E |\sum_i s_i u_i|^2 = \sum_i |u_i|^2`: cross terms average
    to zero. Signing the rows of an output's gradient signs the examples, whatever the
    layers are. The pass runs in a hook of that output, before the training's own frees
    the graph.

    Attributes:
        num_signs: Draws per forward pass; 0 while none are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        owner: Owner,
        *,
        generator: torch.Generator,
        batch_dim: int,
        rank: int = 0,
    ) -> None:
        self.num_signs = 0
        self._parameters = list(parameters)
        self._owner = owner
        self.faults = owner.faults
        self._generator = generator
        self._batch_dim = batch_dim
        self._rank = rank
        self._outputs: dict[int, Tensor] = {}
        self._keys = itertools.count()
        self._found: dict[int, list[tuple[ForwardPass, int, list[Tensor]]]] = {}
        hook = ModelHook(self._on_forward, model)
        self._handle: RemovableHandle = model.register_forward_hook(hook)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
        self.forget()

    def forget(self) -> None:
        """Let go of outputs, whose hooks hold this, and of what was not committed."""
        self._outputs, self._found = {}, {}

    def commit(self, task: int) -> None:
        """Note in each forward pass what graph task ``task`` has found of it."""
        for forward_pass, key, norms in self._found.pop(task, []):
            if forward_pass.signed_norms:
                forward_pass.signed_faults.append(_TWICE)
            forward_pass.signed_norms.extend(norms)
            self._outputs.pop(key, None)

    @guarded
    def _on_forward(self, _: object, args: object, outputs: Any) -> None:
        forward_pass = self._owner.active
        if not self.num_signs or forward_pass is None or is_suspended(self._owner):
            return
        for output in tensors_of(outputs):
            if output.requires_grad:
                key = next(self._keys)
                hook = partial(self._on_gradient, forward_pass, key)
                output.register_hook(hook)  # type: ignore[no-untyped-call]
                self._outputs[key] = output
        while len(self._outputs) > KEPT_OUTPUTS:
            del self._outputs[next(iter(self._outputs))]

    @guarded
    def _on_gradient(self, forward_pass: ForwardPass, key: int, grad: Tensor) -> None:
        output = self._outputs.get(key)
        if is_suspended(self._owner):
            return
        if output is None:
            if forward_pass.signed_norms:
                forward_pass.signed_faults.append(_TWICE)
            return
        axis, count = self._batch_dim, forward_pass.num_examples
        if grad.dim() <= axis or grad.shape[axis] != count:
            forward_pass.signed_faults.append(
                f"random signs need an output with {count} examples on axis {axis}, "
                f"got shape {tuple(grad.shape)}"
            )
            return
        task = torch._C._current_graph_task_id()
        try:
            with suspend_recording():
                norms = [self._norms(output, grad) for _ in range(self.num_signs)]
        except RuntimeError as error:  # such as reentrant checkpoints
            reason = str(error).partition(". ")[0]
            forward_pass.signed_faults.append(f"no second backward pass: {reason}")
            return
        self._found.setdefault(task, []).append((forward_pass, key, norms))

    def _norms(self, output: Tensor, grad: Tensor) -> Tensor:
        """``|sum s_i u_i|²`` of every parameter, for one draw of signs."""
        count = grad.shape[self._batch_dim]
        signs = self._signs(count).to(grad.device, grad.dtype, non_blocking=True)
        shape = [1] * grad.dim()
        shape[self._batch_dim] = count
        found = torch.autograd.grad(
            output,
            self._parameters,
            grad * signs.view(shape),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return sq_norms([widen(g) for g in found])

    def _signs(self, count: int) -> Tensor:
        """Draw signs on the host, different ones on every rank.

        The generators of the ranks may be in one state; with equal signs the errors of
        the ranks would not average out.
        """
        generator = self._generator
        if self._rank:
            seed = int(torch.randint(2**62, (), generator=generator))
            generator = stream(seed, "random signs", self._rank)
        return 2 * torch.randint(2, (count,), generator=generator) - 1
