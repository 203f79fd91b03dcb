"""Curvature along the gradients of a batch's parts, at the weights of its step.

The Hessian has to be independent of the gradients that it is applied to: each half of
the batch gives chunk gradients, and the other half the Hessian for them.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from noisekit.core.layers.per_example import coupling
from noisekit.core.model_state import preserve_model_state
from noisekit.curvature.operators.graph_cache import refuse_once_differentiable
from noisekit.noise.step_quantity import HessianForms
from noisekit.probes.capture.hooks import suspend_recording
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import ForwardPass
from noisekit.probes.estimators.ghost import narrow
from noisekit.probes.options import ProbeOptions
from noisekit.probes.step_metrics.options import FEWEST_CHUNKS


class HessianReplay:
    """Replays a micro-batch in chunks, for ``tr(HΣ)`` and ``G'HG``.

    Costs one and a half forward passes, two gradients and ``num_chunks``
    Hessian-vector products over the batch; holds ``num_chunks`` copies of the
    parameters, five more while it differentiates, and the graph of half the batch.
    Where ghost batches were asked for, these are the chunks, so that examples may be
    coupled within them.

    Attributes:
        wanted: Whether the next passes are replayed.
        has_ghosts: Whether ghost batches are replayed as well.
    """

    def __init__(self, recorder: Recorder, options: ProbeOptions) -> None:
        self.wanted = False
        self._recorder = recorder
        self._options = options
        asked = options.estimator
        names = (asked,) if isinstance(asked, str) else asked
        self.has_ghosts = "ghost" in names
        self._ghost_batch = options.ghost_batch if self.has_ghosts else None

    def observe(self, active: ForwardPass, targets: Any) -> None:  # the loss's own
        """Replay the first pass of a step, if the model and the batch allow it."""
        if active.inputs is None or not active.num_examples:
            return
        size, num_chunks, fault = self._division(active.num_examples)
        if fault:
            active.gathered.hessian = fault
            return
        try:
            forms = self._forms(active, targets, (size, num_chunks))
        except RuntimeError as error:  # such as a kernel that is differentiable once
            reason = str(error).partition("\n")[0]
            active.gathered.hessian = f"no Hessian-vector products: {reason}"
            return
        active.gathered.hessian = HessianForms(forms, size)

    def _forms(
        self, active: ForwardPass, targets: Any, division: tuple[int, int]
    ) -> Tensor:
        """``c_k' H c_l``, averaged over the halves that give ``c`` and ``H``."""
        size, num_chunks = division
        model = self._recorder.model
        parameters = [p for p in self._recorder.parameters if p.requires_grad]

        def losses(first: int) -> list[Tensor]:
            starts = range(first, first + num_chunks * size, size)
            return [self._loss(active, targets, (start, size)) for start in starts]

        middle = num_chunks * size
        with (
            suspend_recording(),
            preserve_model_state(model),
            _differentiable_twice(model),
        ):
            vectors = _gradients(losses(0), parameters)
            graph = losses(middle)
            forms = _curvatures(graph, parameters, vectors)
            vectors = _gradients(graph, parameters, into=vectors)
            # Once more, since two graphs at a time would take twice the memory.
            graph = losses(0)
            return (forms + _curvatures(graph, parameters, vectors)) / 2

    def _loss(self, active: ForwardPass, targets: Any, rows: tuple[int, int]) -> Tensor:
        """Mean loss of some of the batch's examples (start, length)."""
        loss_fn, count = self._options.loss_fn, active.num_examples
        assert loss_fn is not None
        assert count is not None
        assert active.inputs is not None
        args, kwargs = narrow(active.inputs, count, self._recorder.batch_dim, rows)
        outputs = self._recorder.model(*args, **kwargs)
        loss = loss_fn(outputs, narrow(targets, count, 0, rows))
        return loss / rows[1] if self._options.loss_reduction == "sum" else loss

    def _division(self, num_examples: int) -> tuple[int, int, str]:
        """Examples in a chunk, chunks in a half, and why there are none."""
        num_chunks = self._options.num_chunks
        size = num_examples // (2 * num_chunks)
        if self._ghost_batch is not None:
            size = self._ghost_batch
            num_chunks = num_examples // (2 * size)
        else:
            for name, module in self._recorder.model.named_modules():
                if coupling(module):
                    return 0, 0, f"{coupling(module)} couples the examples ({name})"
        if size < 1 or num_chunks < FEWEST_CHUNKS:
            chunks = f"{max(num_chunks, FEWEST_CHUNKS)} chunks of {max(1, size)}"
            return 0, 0, f"{num_examples} examples do not make two halves of {chunks}"
        return size, num_chunks, ""


def _gradients(
    losses: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    into: Tensor | None = None,
) -> Tensor:
    """One gradient per loss ``(K, P)``; the graph is kept."""
    for row, loss in enumerate(losses):
        gradient = _flat_gradient(loss, parameters)
        if into is None:
            into = gradient.new_empty(len(losses), len(gradient))
        into[row] = gradient
    assert into is not None
    return into


def _curvatures(
    losses: Sequence[Tensor], parameters: Sequence[nn.Parameter], vectors: Tensor
) -> Tensor:
    """``v_k' H v_l`` with the Hessian ``H`` of the mean of ``losses`` ``(K, K)``."""
    mean = torch.stack(list(losses)).mean()
    gradient = torch.autograd.grad(
        mean, list(parameters), create_graph=True, materialize_grads=True
    )
    flat = torch.cat([grad.reshape(-1) for grad in gradient])
    refuse_once_differentiable([flat])
    if not flat.requires_grad:
        return vectors.new_zeros(len(vectors), len(vectors))  # linear in everything
    return torch.stack(
        [vectors @ _flat_gradient(flat, parameters, vector) for vector in vectors], 1
    )


def _flat_gradient(
    output: Tensor,
    parameters: Sequence[nn.Parameter],
    vector: Tensor | None = None,
) -> Tensor:
    grads = torch.autograd.grad(
        output,
        list(parameters),
        vector,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([grad.detach().reshape(-1) for grad in grads])


@contextmanager
def _differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Leave out kernels that have no second derivative."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
