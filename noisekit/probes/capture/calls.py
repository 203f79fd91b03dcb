"""Module calls caught in a forward pass, as detached values."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.errors import BatchSizeError
from noisekit.core.layers.call_state import autocast_dtype
from noisekit.core.layers.per_example import Site
from noisekit.core.layers.rule import LayerCall
from noisekit.probes.capture.step_record import CapturedCall, ForwardPass


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


def inputs_of(call: LayerCall) -> list[Tensor]:
    """Return the tensors among the inputs of a call."""
    if len(call.args) == 1 and not call.kwargs:
        return tensors_of(call.args)  # nearly every layer; the general way is slow
    return tensors_of((call.args, call.kwargs))


def versions_of(call: LayerCall) -> tuple[int, ...]:
    """Return how often each input was written to; it tells later writes."""
    return tuple(t._version for t in inputs_of(call))


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


def fault_of(calls: Sequence[CapturedCall], name: str) -> str:
    """Why the calls do not account for a parameter's gradient, if so."""
    if not calls:
        return f"no call of the module that owns {name} reached the loss"
    if any(captured.versions != versions_of(captured.call) for captured in calls):
        return f"an input of {calls[0].site.path} was written to after its use"
    return ""


def without_autocast(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """Exact norms also where the user calls ``backward`` under autocast."""
    kind = parameter.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def unreadable_inputs(inputs: object) -> list[str]:
    """Return why a batch has no examples that could be told apart."""
    tensors = tensors_of(inputs)
    if any(t.layout is not torch.strided or t.is_nested for t in tensors):
        return ["a sparse or nested input has no rows that can be told apart"]
    if any(tensor.numel() == 0 for tensor in tensors[:1]):
        return ["the batch has no examples"]
    return []


def kind_of_call(captured: CapturedCall) -> tuple[str, bool, tuple[int, ...]]:
    """Return what of a call makes the model another one: its site, mode, and ranks."""
    ranks = tuple(tensor.dim() for tensor in inputs_of(captured.call))
    return captured.site.path, captured.site.module.training, ranks
