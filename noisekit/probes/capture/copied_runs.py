"""Forward passes of copies of a model, of which the model takes no notice."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from noisekit.core.layers.per_example import Site
from noisekit.core.model_copies import (
    copy_module,
    copy_value,
    uncached_parametrizations,
)
from noisekit.core.randomness import preserve_rng_state
from noisekit.probes.capture.calls import tensors_of
from noisekit.probes.capture.step_record import CallKey
from noisekit.probes.capture.targets import eagerly

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model was called with."""


@dataclass(slots=True)
class Trace:
    """Tensors of one run, by call of a site and of the model as a whole."""

    inputs: dict[CallKey, list[Tensor]] = field(default_factory=dict)
    outputs: dict[CallKey, list[Tensor]] = field(default_factory=dict)
    whole: list[Tensor] = field(default_factory=list)


class CopiedRuns:
    """Runs a model's copies: a new one each time, in the state the model has now.

    Every run has the same random numbers, hooks, modes and precision.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._model = model
        self._sites = sites

    def run(self, inputs: Inputs) -> Trace:
        """Run a new copy; what it writes to, draws from or counts is its own.

        Raises:
            ModelCopyError: If the model cannot be copied.
        """
        model, trace = copy_module(self._model), Trace()
        args, kwargs = copy_value(inputs)
        for site in self._sites:
            module = model.get_submodule(site.path)
            hook = partial(_note_call, trace, site.path)
            module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        with ExitStack() as stack:
            stack.enter_context(preserve_rng_state())
            stack.enter_context(uncached_parametrizations())
            stack.enter_context(eagerly("torch._dynamo" in sys.modules))
            # As in training, but for the tensors that a backward pass would need.
            stack.enter_context(torch.enable_grad())
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(_forget, _forget)
            )
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    dtype = torch.get_autocast_dtype(kind)
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, cache_enabled=False)
                    )
            trace.whole = tensors_of(model(*args, **kwargs))
        return trace


def _note_call(
    trace: Trace,
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Any,  # whatever the module returns
) -> None:
    """Keep a site's call as a training pass would capture it.

    Cloned, since layers that follow may write to their inputs.
    """
    tensors = tensors_of(outputs)
    if not any(t.requires_grad for t in tensors):
        return
    key = (path, sum(1 for other, _ in trace.inputs if other == path))
    trace.inputs[key] = [t.detach().clone() for t in tensors_of((args, kwargs))]
    trace.outputs[key] = [t.detach().clone() for t in tensors]


def _forget(_: Any) -> Any:  # nothing, which nobody asks for
    """Keep nothing of a tensor that autograd would save."""
    return None
