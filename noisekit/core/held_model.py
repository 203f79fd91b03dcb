"""A model held as it is measured: each forward pass sets out from the same state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import (
    BatchNormPolicy,
    batch_norms,
    call_model,
    measured_modes,
)
from noisekit.core.model_state import ModelState, preserve_model_state
from noisekit.core.precision import Precision


class HeldModel:
    """One model under a BatchNorm policy, and what its forward passes write to.

    The first forward pass is compared with the state before it. Where it changed
    anything, every later one starts from that state again, so that the loss of a batch
    does not depend on which batches went before.

    Attributes:
        model: The model.
        bn: The BatchNorm policy.
        precision: The type that is computed in.
        needs_graph: Whether the model or the loss differentiates by itself, so that
            it cannot be evaluated without gradients.
    """

    def __init__(
        self, model: nn.Module, bn: BatchNormPolicy, precision: Precision
    ) -> None:
        self.model = model
        self.bn = bn
        self.precision = precision
        self.needs_graph = False
        self._observed = False
        self._moves = False
        self._num_tensors = 0
        self._written: list[int] = []
        self._is_held = False
        self._num_moves = 0
        self._start: ModelState | None = None

    @property
    def writes(self) -> bool:
        """Whether a forward pass writes to tensors that the next one may read.

        Graphs of several passes must not be kept then.
        """
        return bool(self._written)

    @contextmanager
    def held(
        self,
        loss_fn: object,
        *,
        moved: Sequence[tuple[nn.Parameter, Tensor]] = (),
        recalibrating: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[None]:
        """Hold the model as measured; on exit everything is restored.

        May be nested: inner calls only move parameters.

        Args:
            loss_fn: Its state is restored too where it is a module.
            moved: Parameters with the values to hold them at. Their own memory is set
                aside, not written to, so that they come back without rounding.
            recalibrating: Sets BatchNorm's statistics, within the modes measured in.
        """
        if self._is_held:
            self._num_moves += bool(moved)
            try:
                with _moved(self._leaves(moved)):
                    yield
            finally:
                self._num_moves -= bool(moved)
            return
        evaluated = [m for m in (self.model, loss_fn) if isinstance(m, nn.Module)]
        replaced: list[Tensor] = [parameter for parameter, _ in moved]
        replaced += self.precision.narrow_tensors(*evaluated)
        with ExitStack() as stack:
            # First of all: tensors made in inference mode cannot be differentiated.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(preserve_model_state(*evaluated, uncopied=replaced))
            stack.enter_context(self.precision.held(*evaluated))
            stack.enter_context(_moved(self._leaves(moved)))
            stack.enter_context(measured_modes(self.model, self.bn))
            self._is_held = True
            stack.callback(setattr, self, "_is_held", False)
            stack.enter_context(recalibrating())
            if self._moves or not self._observed:
                self._start = ModelState(*evaluated)
                self._start.set_aside()
                # Positions are of the modules that there were.
                self._observed &= len(self._start.tensors) == self._num_tensors
                stack.callback(setattr, self, "_start", None)
            yield

    def outputs(
        self,
        inputs: Any,  # whatever the model takes
        *,
        constant: Sequence[nn.Parameter] = (),
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Return the model's outputs; to be used inside ``held()``.

        Args:
            inputs: What the model is called with.
            constant: Parameters that a forward pass must not write to.
            tensors: Tensors in the place of the parameters and buffers of these
                names, under all names that each has.

        Raises:
            UsageError: If the forward pass writes to ``constant`` parameters.
        """
        if self._moves and self._start is not None:
            self._start.reset(self._written)
        try:
            with nullcontext() if tensors is None else _replaced(self.model, tensors):
                outputs = call_model(self.model, inputs)
        except RuntimeError as error:
            if self.precision.dtype is None or "dtype" not in str(error):
                raise
            raise UsageError(
                f"a model narrower than {self.precision.dtype} is measured in that "
                f"type, got one that casts in its forward pass: {error}; cast to the "
                "type of its parameters there, as by x.to(self.weight.dtype)."
            ) from error
        if self._start is not None:
            if not (self._observed or self._num_moves) and tensors is None:
                self._observe(self._start)
            if self._written:
                self._check_constant(self._start, constant)
        return outputs

    def _observe(self, start: ModelState) -> None:
        """Note what the first forward pass changed."""
        # BatchNorm moves its running statistics and reads the batch's own.
        norms = batch_norms(self.model)
        ignored = {id(b) for layer in norms for b in layer.buffers(recurse=False)}
        tensors = start.tensors
        self._written = [i for i in start.written() if id(tensors[i]) not in ignored]
        self._moves = bool(self._written) or start.has_moved()
        self._num_tensors = len(tensors)
        self._observed = True

    def _check_constant(
        self, start: ModelState, constant: Sequence[nn.Parameter]
    ) -> None:
        written = {id(start.tensors[i]) for i in self._written}
        written &= {id(parameter) for parameter in constant}
        if written:
            named = self.model.named_parameters()
            names = [name for name, p in named if id(p) in written]
            raise UsageError(
                "a measurement needs a forward pass that leaves the measured "
                f"parameters as they are, got {type(self.model).__name__}, which "
                f"writes to {', '.join(names[:5])} when it is called; if it "
                "initialises them with its first batch, call it once beforehand, else "
                "leave them out with params= or set requires_grad_(False) on them."
            )

    def _leaves(
        self, moved: Sequence[tuple[nn.Parameter, Tensor]]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        leaves = self.precision.leaves_of(parameter for parameter, _ in moved)
        return [(leaf, value) for leaf, (_, value) in zip(leaves, moved, strict=True)]


@contextmanager
def _moved(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Put other memory in the place of parameters' own."""
    own = [leaf.data for leaf, _ in values]
    try:
        for leaf, value in values:
            leaf.data = value.to(leaf.device, leaf.dtype)
        yield
    finally:
        for (leaf, _), data in zip(values, own, strict=True):
            leaf.data = data


@contextmanager
def _replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters and buffers.

    Every place of each is noted before any is filled: ``torch.func.functional_call``
    leaves a replaced tensor behind where a module has two names.
    """
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    chosen = {id(named[name]): tensor for name, tensor in tensors.items()}
    places = [
        (table, name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if id(tensor) in chosen
    ]
    try:
        for table, name, tensor in places:
            table[name] = chosen[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for table, name, tensor in places:
            table[name] = tensor  # type: ignore[assignment]
