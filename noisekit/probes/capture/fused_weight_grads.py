r"""Weight gradients of layers computed by the probe, as sums over per-example parts.

The norms need the parts :math:`u_i` or their chunk sums anyway, and the gradient is
:math:`\sum_i u_i`. So on a step that is read the layer runs with detached weights,
which makes autograd skip its own weight gradient, and an identity operation on its
output returns the sum as the gradient of the parameters instead. The gradient arrives
through autograd, so that accumulation, parameter hooks and the reducers of data
parallelism work as before. The order of summation differs, and with it the last bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from noisekit.core.errors import UsageError
from noisekit.core.layers.chunks import chunk_slices
from noisekit.core.layers.convolution import ConvRule
from noisekit.core.layers.decomposition import chunk_pieces, example_pieces
from noisekit.core.layers.linear import LinearRule
from noisekit.core.layers.per_example import Site
from noisekit.core.layers.rule import LayerCall
from noisekit.probes.capture.hooks import ModelHook, suspend_recording
from noisekit.probes.capture.sites import SitePlan
from noisekit.probes.capture.step_record import CapturedCall
from noisekit.probes.capture.unit_norms import UnitNorms


@dataclass(slots=True)
class _Layer:
    """A call whose output gradient has not arrived yet.

    Attributes:
        site: The layer.
        names: Its parameters, in the order of their gradients.
        read: Computes the gradients of a captured call from the requested parts.
        captured: The recorder's record of the call, if it is to be read.
    """

    site: Site
    names: tuple[str, ...]
    read: "Callable[[_Layer, LayerCall], dict[str, Tensor] | None]"
    captured: CapturedCall | None = None

    def gradients(self, inputs: Tensor, output_grad: Tensor) -> list[Tensor]:
        """The gradients of the parameters; the parts' norms are stored at the call."""
        captured, found = self.captured, None
        if captured is not None and _is_alone(captured):
            call = replace(captured.call, args=(inputs,), grads=[output_grad])
            found = self.read(self, call)
        if found is None:
            # Not read: one gradient of the whole batch. The sum over all rows does not
            # depend on which axis is that of the examples.
            module, count = self.site.module, len(inputs)
            call = LayerCall(module, (inputs,), {}, (0,), count, [output_grad])
            found = self.site.rule.summed_grads(call, self.names, slice(0, count))
        return [found[name] for name in self.names]


def _is_alone(captured: CapturedCall) -> bool:
    """Whether no other call of the pass contributes to the same parameters.

    Norms of a sum over several calls do not follow from those of each.
    """
    calls = captured.forward_pass.num_calls.get(captured.site.path)
    return bool(captured.call.axes) and not captured.released and calls == 1


class Replacement:
    """Replaces the weight gradients of the layers where that pays."""

    def __init__(
        self, plan: SitePlan, units: UnitNorms, is_wanted: Callable[[], bool]
    ) -> None:
        """Prepare to replace gradients of ``plan``'s layers.

        Args:
            plan: Where each parameter is read.
            units: What is read of the layers' calls.
            is_wanted: Whether calls are captured now.
        """
        self._plan = plan
        self._units = units
        self._is_wanted = is_wanted
        self._open: dict[str, _Layer] = {}
        self._waiting: dict[str, _Layer] = {}

    def hook(self, site: Site) -> list[RemovableHandle]:
        """Hook a layer, if it is of a kind whose gradients can be replaced.

        To be called after the probe's other hooks on the layer are registered, so
        that they see the output that leads to the replaced gradients.
        """
        alone = len(self._plan.sole_names(site)) == len(site.params)
        if not alone or not isinstance(site.rule, ConvRule | LinearRule):
            return []
        module = site.module
        start, end = (ModelHook(m, module, site) for m in (self._start, self._end))
        return [
            module.register_forward_pre_hook(start),
            module.register_forward_hook(end, prepend=True, always_call=True),
        ]

    def link(self, captured: CapturedCall) -> None:
        """Have the layer that was just called leave its pieces at ``captured``."""
        layer = self._waiting.pop(captured.site.path, None)
        if layer is not None:
            layer.captured = captured

    def give_back(self) -> None:
        """Restore the parameters of layers whose call was interrupted."""
        for layer in self._open.values():
            _show_own(layer)
        self._open, self._waiting = {}, {}

    def _start(self, site: object, args: tuple[Any, ...]) -> None:
        """Let the layer run with detached copies of its parameters."""
        assert isinstance(site, Site)
        self._waiting.pop(site.path, None)
        if not (self._is_wanted() and self._pays(site, args) and _is_plain_run()):
            return
        own = {n: p for n, p in site.params.items() if p.requires_grad}
        if not own or any(p.dtype != args[0].dtype for p in own.values()):
            return
        self._open[site.path] = _Layer(site, tuple(own), self._read)
        for name, parameter in own.items():
            # An instance attribute precedes nn.Module.__getattr__, which looks the name
            # up in _parameters; the parameter itself stays there, as for state_dict().
            vars(site.module)[name] = parameter.detach()

    def _end(
        self, site: object, args: tuple[Any, ...], output: object
    ) -> Tensor | None:
        """Restore the parameters, and attach the operation that has their gradient."""
        assert isinstance(site, Site)
        layer = self._open.pop(site.path, None)
        if layer is None:
            return None
        _show_own(layer)
        if not isinstance(output, Tensor):
            return None  # the call has failed
        self._waiting[site.path] = layer
        parameters = [site.params[name] for name in layer.names]
        replaced: Tensor = _Replaced.apply(output, args[0].detach(), layer, *parameters)
        return replaced

    def _pays(self, site: Site, args: tuple[Any, ...]) -> bool:
        """Whether requested parts of the gradient have no cheaper formula."""
        if len(args) != 1 or not isinstance(args[0], Tensor):
            return False
        request, shape = self._units.request, args[0].shape
        formed = bool(request.per_example or request.num_chunks)
        if isinstance(site.rule, LinearRule):
            # With one position per example |b a'| = |a| |b|, without any gradient.
            return len(shape) > 2 and formed
        batched = len(site.rule.example_axes(site.module, shape)) > 0
        return batched and formed

    def _read(self, layer: _Layer, call: LayerCall) -> dict[str, Tensor] | None:
        """The gradients; the requested norms are stored at the captured call."""
        request, rule, captured = self._units.request, layer.site.rule, layer.captured
        assert captured is not None
        if request.per_example:
            squares = request.squares or request.preconditioned
            pieces = example_pieces(rule, call, layer.names, square_sums=squares)
            captured.keep(pieces)
        elif request.num_chunks:
            chunks = chunk_slices(call.num_examples, request.num_chunks)
            pieces = chunk_pieces(rule, call, layer.names, chunks)
            captured.chunk_norms = {name: p.sq_norms for name, p in pieces.items()}
        else:
            return None
        return {name: p.total for name, p in pieces.items()}


def _show_own(layer: _Layer) -> None:
    """Remove the detached copies, so that the parameters are visible again."""
    for name in layer.names:
        vars(layer.site.module).pop(name, None)


def _is_plain_run() -> bool:
    """Whether the forward pass runs once, eagerly, and outside a backward pass.

    Checkpointed parts run again inside a backward pass; autocast casts gradients by
    rules of its own; functorch transforms would have to trace the replacement.
    """
    return (
        torch._C._current_graph_task_id() == -1
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
    )


class _Replaced(torch.autograd.Function):
    """Identity on a layer's output, whose backward also returns parameter gradients."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, layer: _Layer, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer = layer
        # Not a view: autograd forbids in-place activations on views made here.
        return output.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UsageError(
                "exact_bits=False needs gradients that are not differentiated again, "
                "got create_graph=True (a gradient penalty, a Hessian product); attach "
                "with exact_bits=True, or compute them on a step that is not read."
            )
        (inputs,), (grad,) = ctx.saved_tensors, grads
        with suspend_recording():
            found = ctx.layer.gradients(inputs, grad)
        return grad, None, None, *found
