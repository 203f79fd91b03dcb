"""Curvature along the gradients of a batch's parts, at the weights of its step.

The Hessian has to be independent of the gradients that it is applied to: each half of
the batch gives chunk gradients ``c_k``, and the other half the Hessian ``H`` for them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from noisekit.core.errors import UsageError
from noisekit.core.layers.per_example import coupling
from noisekit.core.model_copies import copied_parameters, copy_module, copy_value
from noisekit.core.randomness import preserve_rng_state
from noisekit.core.results import Unavailable
from noisekit.curvature.operators.graph_cache import check_twice_differentiable
from noisekit.noise.step_quantity import HessianForms
from noisekit.probes.capture.hooks import suspend_recording
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import ForwardPass
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.ghost import narrow
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.step_metrics.cabs import check_loss_given
from noisekit.probes.step_metrics.metric import (
    MetricStep,
    RankSum,
    State,
    StepMetric,
)

FEWEST_CHUNKS = 3
"""Chunks that the jackknife needs."""


class HessianNoise(StepMetric):
    """``c_k' H c_l`` of replayed chunks, for ``tr(HΣ)`` and ``G'HG``.

    Costs one and a half forward passes, two gradients and ``num_chunks``
    Hessian-vector products over the batch; holds ``num_chunks`` copies of the
    parameters, five more while it differentiates, and the graph of half the batch.
    Where ghost batches are replayed, these are the chunks, so that examples may be
    coupled within them.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, section 2.2.
    """

    name = "hessian_noise_scale"
    quantities = ("hessian_noise_scale", "noise_curvature", "gradient_curvature")
    settings = ("hessian_every", "num_chunks")

    def __init__(self, *, hessian_every: int, num_chunks: int) -> None:
        """Replay once in ``hessian_every`` readings, in twice ``num_chunks`` chunks.

        Raises:
            UsageError: If there are too few chunks for a jackknife.
        """
        if num_chunks < FEWEST_CHUNKS:
            raise UsageError(
                f"quantities={self.name!r} needs num_chunks of {FEWEST_CHUNKS} or "
                f"more in each half of the batch, got {num_chunks}."
            )
        self._every = hessian_every
        self._num_chunks = num_chunks
        self._due = False

    def set_up(self, context: ProbeContext) -> None:
        """Check that the loss is seen, and that ranks' chunks are alike.

        Raises:
            UsageError: If it is not, or they are not.
        """
        check_loss_given(self.name, context)
        ranks = context.recorder.replicas.ranks
        if context.ghost_batch is not None and not ranks.alone:
            raise UsageError(
                f"quantities={self.name!r} of ghost batches needs one process, got "
                f"{ranks.size} ranks; leave estimator='ghost' out, or the quantity."
            )
        self._context = context

    @property
    def rank_sums(self) -> Mapping[str, RankSum]:
        """Averages over the ranks; of the size to see whether it is one."""
        sizes = dict.fromkeys(("chunk_size", "chunk_size_squared"), RankSum(1))
        return {"forms": RankSum(self._num_chunks**2), **sizes}

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the model's inputs where a replay is due."""
        self._due = num_readings % self._every == 0
        recorder.wanted.inputs |= self._due

    def on_loss(self, active: ForwardPass, targets: Any, loss: Tensor) -> None:
        """Replay the open pass, if the model and the batch allow it."""
        if not self._due or active.inputs is None or not active.num_examples:
            return
        size, num_chunks, fault = self._division(active.num_examples)
        if fault:
            active.gathered[self] = Unavailable(fault)
            return
        try:
            forms = self._forms(active, targets, (size, num_chunks))
        except RuntimeError as error:  # such as a kernel that is differentiable once
            reason = str(error).partition("\n")[0]
            active.gathered[self] = Unavailable(f"no Hessian-vector products: {reason}")
            return
        active.gathered[self] = (forms, size)

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return the forms of the step's first pass."""
        if not self._due:
            return Unavailable(f"it is read once in {self._every} readings")
        unseen = Unavailable("the loss was not seen: call it through probe.loss_fn")
        found = next((p.gathered.get(self, unseen) for p in step.passes), unseen)
        if isinstance(found, Unavailable):
            return found
        forms, size = found
        return {
            "forms": forms.reshape(-1),
            "chunk_size": float(size),
            "chunk_size_squared": float(size**2),
        }

    def value(self, step: MetricStep) -> HessianForms | Unavailable:
        """Return the forms; two ranks' chunks of different sizes have none."""
        size, squared = step.state["chunk_size"], step.state["chunk_size_squared"]
        if squared != size**2:
            return Unavailable("the ranks' chunks are of different sizes")
        forms = step.tensor("forms")
        width = round(forms.numel() ** 0.5)
        return HessianForms(forms.view(width, width), int(size))

    def _forms(
        self, active: ForwardPass, targets: Any, division: tuple[int, int]
    ) -> Tensor:
        """``c_k' H c_l``, averaged over the halves that give ``c`` and ``H``."""
        size, num_chunks = division
        recorder = self._context.recorder
        model = copy_module(recorder.model)
        trained = [p for p in recorder.parameters if p.requires_grad]
        parameters = copied_parameters(recorder.model, model, trained)

        def losses(first: int) -> list[Tensor]:
            starts = range(first, first + num_chunks * size, size)
            return [self._loss(model, active, targets, (s, size)) for s in starts]

        middle = num_chunks * size
        with (
            suspend_recording(),
            preserve_rng_state(),
            _differentiable_twice(model),
        ):
            vectors = _gradients(losses(0), parameters)
            graph = losses(middle)
            forms = _curvatures(graph, parameters, vectors)
            vectors = _gradients(graph, parameters, into=vectors)
            # Once more, since two graphs at a time would take twice the memory.
            graph = losses(0)
            return (forms + _curvatures(graph, parameters, vectors)) / 2

    def _loss(
        self,
        model: nn.Module,
        active: ForwardPass,
        targets: Any,
        rows: tuple[int, int],
    ) -> Tensor:
        """Mean loss of some of the batch's examples (start, length)."""
        loss_fn, count = self._context.loss_fn, active.num_examples
        assert loss_fn is not None
        assert count is not None
        assert active.inputs is not None
        inputs, axis = copy_value(active.inputs), self._context.recorder.batch_dim
        args, kwargs = narrow(inputs, count, axis, rows)
        outputs = model(*args, **kwargs)
        loss = loss_fn(outputs, narrow(targets, count, 0, rows))
        return loss / rows[1] if self._context.loss_reduction == "sum" else loss

    def _division(self, num_examples: int) -> tuple[int, int, str]:
        """Examples in a chunk, chunks in a half, and why there are none."""
        num_chunks, ghost_batch = self._num_chunks, self._context.ghost_batch
        size = num_examples // (2 * num_chunks)
        if ghost_batch is not None:
            size = ghost_batch
            num_chunks = num_examples // (2 * size)
        else:
            for name, module in self._context.recorder.model.named_modules():
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
    check_twice_differentiable([flat])
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
