"""Module calls caught in a forward pass, and which of their axes are examples."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from noisekit.core.errors import BatchSizeError, LayerReadError
from noisekit.core.layers.batch_axis import axis_of_examples
from noisekit.core.layers.call_state import autocast_dtype
from noisekit.core.layers.per_example import Site
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.layers.rule import LayerCall
from noisekit.probes.capture.step_record import CallKey, CapturedCall, ForwardPass


def captured_call(
    site: Site,
    forward_pass: ForwardPass,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    num_outputs: int,
) -> CapturedCall:
    """Return the call with its inputs detached; their memory is not copied."""
    assert forward_pass.num_examples is not None
    args, kwargs = _detached(*inputs)
    grads: list[Tensor | None] = [None] * num_outputs
    call = LayerCall(site.module, args, kwargs, (), forward_pass.num_examples, grads)
    call.autocast = autocast_dtype(site.module)
    number = forward_pass.num_calls.get(site.path, 0)
    forward_pass.num_calls[site.path] = number + 1
    key = (site.path, number)
    return CapturedCall(site, call, forward_pass, versions_of(call), key)


def _detached(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return (args[0].detach(),), {}  # nearly every layer; the general way is slow
    detached: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, Tensor.detach, (args, kwargs)
    )
    return detached


def tensors_of(tree: Any) -> list[Tensor]:  # whatever a module takes or returns
    """Return the tensors in a nest of tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple) and len(tree) == 1 and isinstance(tree[0], Tensor):
        return [tree[0]]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def versions_of(call: LayerCall) -> tuple[int, ...]:
    """Return how often each input was written to; it tells later writes."""
    if len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Tensor):
        return (call.args[0]._version,)
    return tuple(t._version for t in tensors_of((call.args, call.kwargs)))


class ExampleAxes:
    """Finds the axis of the examples of every captured input.

    The model is run once on one example less: the axis that shrinks is the one. Sizes
    alone would take as many positions, queries or channels for as many examples. They
    decide where a model cannot be run on a smaller batch, and leave no doubt.
    """

    def __init__(self) -> None:
        self._known: dict[CallKey, tuple[int | None, ...]] = {}
        self._by_size: set[str] = set()

    def settled(self, captured: CapturedCall) -> bool:
        """Whether no smaller run can tell more about this call."""
        return captured.key[0] in self._by_size or self._find(captured) is not None

    def resolve(self, captured: CapturedCall) -> None:
        """Set the axes of the call's inputs.

        Raises:
            BatchSizeError: If sizes leave a doubt that no smaller run has settled.
            LayerReadError: If no input has an axis of the examples.
        """
        call = captured.call
        tensors = _example_inputs(captured)
        known = self._find(captured) or ()
        call.axes = tuple(
            _axis(captured, position, tensor.shape, known)
            for position, tensor in enumerate(tensors)
        )
        if all(axis is None for axis in call.axes):
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensor"
            raise LayerReadError(
                f"its input has no axis of {call.num_examples} examples ({shapes})"
            )

    def _find(self, captured: CapturedCall) -> tuple[int | None, ...] | None:
        """Axes known of this call, or of all others of its module alike.

        A module may be called more often than it was: in longer loops, or again when a
        checkpoint is recomputed.
        """
        exact = self._known.get(captured.key)
        if exact is not None:
            return exact
        path = captured.key[0]
        others = {axes for key, axes in self._known.items() if key[0] == path}
        return others.pop() if len(others) == 1 else None

    def trace(
        self, calls: Iterable[CapturedCall], smaller: Mapping[CallKey, list[torch.Size]]
    ) -> None:
        """Keep which axes of ``calls`` shrank when the batch was smaller."""
        for captured in calls:
            shapes = [tensor.shape for tensor in _example_inputs(captured)]
            before = smaller.get(captured.key, ())
            if len(before) >= len(shapes):
                self._known[captured.key] = tuple(
                    shrunk_axis(a, b) for a, b in zip(before, shapes, strict=False)
                )
            else:
                self._by_size.add(captured.key[0])


def _axis(
    captured: CapturedCall,
    position: int,
    shape: torch.Size,
    known: tuple[int | None, ...],
) -> int | None:
    site, num_examples = captured.site, captured.call.num_examples
    if position < len(known) and num_examples > 1:
        axis = known[position]
        fits = axis is not None and shape[axis] == num_examples
        return axis if fits else None
    return axis_of_examples(
        shape,
        num_examples,
        among=site.rule.example_axes(site.module, shape, position),
        where=f"input {position} of {site.path or 'the model'}",
    )


def _example_inputs(captured: CapturedCall) -> list[Tensor]:
    """A layer's only input, or every tensor that goes into a replayed module."""
    tensors = tensors_of((captured.call.args, captured.call.kwargs))
    replayed = isinstance(captured.site.rule, ModuleReplay)
    return tensors if replayed else tensors[:1]


def shrunk_axis(smaller: torch.Size, shape: torch.Size) -> int | None:
    """Return the one axis that differs between the smaller batch and this one."""
    if len(smaller) != len(shape):
        return None
    changed = [i for i, (a, b) in enumerate(zip(smaller, shape, strict=True)) if a != b]
    return changed[0] if len(changed) == 1 else None


def one_example_less(
    inputs: tuple[tuple[Any, ...], dict[str, Any]], num_examples: int, batch_dim: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the model's inputs without the batch's last example."""

    def shorten(tensor: Tensor) -> Tensor:
        if tensor.dim() > batch_dim and tensor.shape[batch_dim] == num_examples:
            return tensor.narrow(batch_dim, 0, num_examples - 1)
        return tensor

    shortened: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, shorten, inputs
    )
    return shortened


def batch_size_of(
    inputs: tuple[tuple[Any, ...], dict[str, Any]], batch_dim: int
) -> int | None:
    """Return the length of the first input tensor's batch axis.

    Raises:
        BatchSizeError: If that tensor has no such axis.
    """
    first = inputs[0][:1] if inputs[0] and isinstance(inputs[0][0], Tensor) else inputs
    for tensor in tensors_of(first):
        if tensor.dim() <= batch_dim:
            raise BatchSizeError(
                f"a probe needs a batch axis batch_dim={batch_dim}, got a first input "
                f"of shape {tuple(tensor.shape)}; add the batch axis, or say where it "
                "is with batch_dim=."
            )
        return tensor.shape[batch_dim]
    return None
