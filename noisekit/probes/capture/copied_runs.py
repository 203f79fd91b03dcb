"""Forward passes of copies of a model, of which the model takes no notice."""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from noisekit.core.layers.per_example import Site
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.model_copies import (
    copy_module,
    copy_value,
    uncached_parametrizations,
)
from noisekit.core.randomness import preserve_rng_state
from noisekit.probes.capture.broadcast_nodes import MeetingTap, source_node
from noisekit.probes.capture.broadcasts import (
    bare_parameters,
    may_be_shared,
    name_of_output,
)
from noisekit.probes.capture.calls import tensors_of
from noisekit.probes.capture.step_record import CallKey
from noisekit.probes.capture.targets import eagerly

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model was called with."""


class RunListener(Protocol):
    """Looks at the tensors of a run while they are there."""

    def note_call(
        self, key: CallKey, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Take in a site's call; layers that follow may write to its tensors."""


@dataclass(slots=True)
class Trace:
    """Copies of the tensors of one run, by call of a site."""

    inputs: dict[CallKey, list[Tensor]] = field(default_factory=dict)
    outputs: dict[CallKey, list[Tensor]] = field(default_factory=dict)

    def note_call(
        self, key: CallKey, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Copy the tensors of a call."""
        self.inputs[key] = [tensor.clone() for tensor in inputs]
        self.outputs[key] = [tensor.clone() for tensor in outputs]


class CopiedRuns:
    """Runs a model's copies: a new one each time, in the state the model has now.

    Every run has the same random numbers, hooks, modes and precision.

    Attributes:
        num_runs: Runs so far.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.num_runs = 0
        self._model = model
        self._sites = sites
        self._bare = bare_parameters(sites)
        self._taps = bool(self._bare) or any(map(may_be_shared, sites))

    def run(self, inputs: Inputs, listener: RunListener) -> list[Tensor]:
        """Run a new copy; what it writes to, draws from or counts is its own.

        Returns:
            The model's outputs.

        Raises:
            ModelCopyError: If the model cannot be copied.
        """
        self.num_runs += 1
        model, calls = copy_module(self._model), Counter[str]()

        def show(name: str, result: Tensor) -> None:
            listener.note_call((name, calls[name]), [result.detach()], [])
            calls[name] += 1

        sources = {source_node(model.get_parameter(n)): n for n in self._bare}
        tap = MeetingTap(sources, show)
        args, kwargs = copy_value(inputs)
        for site in self._sites:
            module = model.get_submodule(site.path)
            hook = partial(_note_call, listener, calls, tap, site)
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
            if self._taps:
                stack.enter_context(tap)
            return tensors_of(model(*args, **kwargs))


def _note_call(
    listener: RunListener,
    calls: Counter[str],
    tap: MeetingTap,
    site: Site,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Any,  # whatever the module returns
) -> None:
    """Show a site's call to the listener, if a training pass would capture it.

    Of a layer with a rule the first input decides: its outputs follow, row by row.
    """
    found, given = tensors_of(outputs), tensors_of((args, kwargs))
    if not any(t.requires_grad for t in found):
        return
    key = (site.path, calls[site.path])
    if not isinstance(site.rule, ModuleReplay):
        if may_be_shared(site) and found[0].grad_fn is not None:
            tap.sources[found[0].grad_fn] = name_of_output(key)
        found, given = [], given[:1]
    calls[site.path] += 1
    listener.note_call(key, [t.detach() for t in given], [t.detach() for t in found])


def _forget(_: Any) -> Any:  # nothing, which nobody asks for
    """Keep nothing of a tensor that autograd would save."""
    return None
