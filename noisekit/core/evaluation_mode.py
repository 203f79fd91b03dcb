"""Evaluation mode of a measured model: BatchNorm, dropout, and its restoration."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from noisekit.core.batches import Batch, count_examples
from noisekit.core.errors import UsageError
from noisekit.core.model_state import preserve_model_state

BatchNormPolicy = Literal["running", "recalibrated", "batch"]


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def call_model(model: nn.Module, inputs: Any) -> Any:  # whatever the model takes
    """Return the model's outputs; a tuple or a mapping is unpacked where it fits."""
    args, kwargs = model_arguments(inputs, model)
    return model(*args, **kwargs)


def model_arguments(
    inputs: Any,  # whatever the model takes
    model: nn.Module | None = None,
) -> _Arguments:
    """Return the positional and the keyword arguments that stand for ``inputs``.

    A mapping is unpacked into keywords and a tuple or list into positions, unless the
    model's ``forward`` takes no such arguments and so wants it as one.
    """
    takes_one: _Arguments = ((inputs,), {})
    if isinstance(inputs, Mapping):
        unpacked: _Arguments = ((), dict(inputs))
    elif isinstance(inputs, tuple | list):
        unpacked = (tuple(inputs), {})
    else:
        return takes_one
    signature = None if model is None else _signature(model)
    if signature is None or _binds(signature, unpacked):
        return unpacked
    return takes_one if _binds(signature, takes_one) else unpacked


def _signature(model: nn.Module) -> inspect.Signature | None:
    """How the model is called, if Python knows it."""
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def _binds(signature: inspect.Signature, arguments: _Arguments) -> bool:
    try:
        signature.bind(*arguments[0], **arguments[1])
    except TypeError:
        return False
    return True


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or ``model`` itself."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of ``model``."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def check_policy(model: nn.Module, bn: str) -> None:
    """Refuse a BatchNorm policy that does not exist or that the model cannot follow.

    Raises:
        UsageError: In both cases.
    """
    if bn not in get_args(BatchNormPolicy):
        known = ", ".join(repr(name) for name in get_args(BatchNormPolicy))
        raise UsageError(f"bn needs to be one of {known}, got {bn!r}.")
    without = [layer for layer in batch_norms(model) if layer.running_mean is None]
    if bn != "batch" and without:
        raise UsageError(
            f"bn={bn!r} needs running statistics, got {len(without)} BatchNorm layers "
            "with track_running_stats=False; use bn='batch'."
        )


@contextmanager
def evaluation_mode(model: nn.Module, bn: BatchNormPolicy) -> Iterator[None]:
    """Switch to what is measured, and restore all of the model's state on exit.

    ``bn="recalibrated"`` is left to the caller, who has the data.
    """
    # First of all: tensors made in inference mode cannot be differentiated.
    with (
        torch.inference_mode(False),
        preserve_model_state(model),
        measured_modes(model, bn),
    ):
        yield


@contextmanager
def measured_modes(model: nn.Module, bn: BatchNormPolicy) -> Iterator[None]:
    """Switch dropout off, gradients on, and to kernels with second derivatives.

    The modules' modes are left as they are measured. Their ``train`` methods are not
    called: some merge weights or move data when they are.
    """
    for module in model.modules():
        module.training = False
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # the same gradient, without a layout of its own
    for layer in batch_norms(model) if bn == "batch" else ():
        layer.training = True
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        # The fused attention kernels have no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_attention_fast_path())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN's recurrent layers have no backward pass in evaluation mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:
            # Compiled parts have no second derivative: run what they were made of.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def recalibrated(
    model: nn.Module,
    batches: Iterable[Batch],
    summed: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Iterator[None]:
    """Use the mean over ``batches`` of each BatchNorm layer's batch statistics.

    Batches count by their examples. The layers' own running tensors are set aside,
    not overwritten.

    Args:
        model: Whose layers.
        batches: This process's share of the data.
        summed: Returns the sum of a tensor over all processes.
    """
    layers = batch_norms(model)
    own = [(n.running_mean, n.running_var, n.num_batches_tracked) for n in layers]
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            assert layer.running_mean is not None  # refused by check_policy
            layer.running_mean = torch.zeros_like(layer.running_mean)
            layer.running_var = torch.ones_like(layer.running_mean)
            layer.num_batches_tracked = None
            layer.training = True
        seen = 0
        with torch.no_grad():
            for batch in batches:
                seen += count_examples(batch)
                for layer in layers:
                    layer.momentum = count_examples(batch) / seen
                call_model(model, batch[0])
        total = float(summed(torch.tensor(float(seen))))
        for layer in layers:
            layer.training = False
            if total != seen:
                _merge_statistics(layer, seen / total, summed)
        yield
    finally:
        for layer, momentum, tensors in zip(layers, momenta, own, strict=True):
            layer.momentum = momentum
            layer.running_mean, layer.running_var, layer.num_batches_tracked = tensors


def _merge_statistics(
    layer: _BatchNorm, share: float, summed: Callable[[Tensor], Tensor]
) -> None:
    """Average a layer's statistics over processes by their shares of the examples."""
    assert layer.running_mean is not None  # both set by the caller
    assert layer.running_var is not None
    layer.running_mean = summed(layer.running_mean * share)
    layer.running_var = summed(layer.running_var * share)


@contextmanager
def _no_attention_fast_path() -> Iterator[None]:
    """Run Transformer layers the same way with and without gradients."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
