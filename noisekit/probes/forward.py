"""The forward side of a probe: passes opened, calls of sites captured."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from noisekit.core.errors import (
    BatchSizeError,
    CoupledExamplesError,
    LayerReadError,
)
from noisekit.core.mode import model_given_back
from noisekit.core.module_replay import ModuleReplay, random_state
from noisekit.core.per_example import Site
from noisekit.probes.capture import (
    ExampleAxes,
    batch_size_of,
    captured_call,
    one_example_less,
    tensors_of,
)
from noisekit.probes.hooks import ModelHook
from noisekit.probes.passes import CallKey, CapturedCall, ForwardPass
from noisekit.probes.silence import silence, silenced
from noisekit.probes.sites import SitePlan


@dataclass(slots=True)
class Wanted:
    """What the next passes are to be read for.

    Attributes:
        gradient: Whether the gradient's norm is wanted.
        examples: Whether per-example norms are wanted as well.
        closure: Whether the closure is checked.
        inputs: Whether each pass keeps the model's inputs, for a replay.
        refuses_coupling: Whether coupled examples raise, instead of being noted.
        tangents: A direction per parameter; each example's inner product with it is
            then wanted too.
    """

    gradient: bool = True
    examples: bool = True
    closure: bool = True
    inputs: bool = False
    refuses_coupling: bool = False
    tangents: Mapping[str, Tensor] | None = None


class Listener(Protocol):
    """The backward side, to which captured calls are handed through tensor hooks."""

    def on_forward_start(self) -> None:
        """A new pass begins; no backward pass is under way."""

    def on_model_grad(self, forward_pass: ForwardPass, grad: Tensor) -> None:
        """The gradient of one of the model's outputs has arrived."""

    def on_output_grad(
        self, captured: CapturedCall, position: int, grad: Tensor
    ) -> None:
        """The gradient of one of a site's outputs has arrived."""

    def on_unreadable(self, site: Site, forward_pass: ForwardPass, reason: str) -> None:
        """A site's call does not tell per-example gradients."""


class ForwardCapture:
    """Hooks a model's forward pass and captures the calls of its sites.

    Attributes:
        active: The last pass with gradients, also while it runs.
        refusal: Why no pass can be read any more; empty while passes can.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SitePlan,
        listener: Listener,
        *,
        wanted: Wanted,
        batch_dim: int,
    ) -> None:
        self.active: ForwardPass | None = None
        self.refusal = ""
        self._model = model
        self._plan = plan
        self._listener = listener
        self._wanted = wanted
        self._batch_dim = batch_dim
        self._batch_norms = [
            (name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)
        ]
        self._axes = ExampleAxes()
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._calls: list[CapturedCall] = []
        self._rng_states: dict[str, list[Tensor]] = {}
        self._smaller: dict[CallKey, list[torch.Size]] | None = None
        start, end = ModelHook(self._start, model), ModelHook(self._end, model)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(start, with_kwargs=True, prepend=True),
            model.register_forward_hook(end),
        ]
        self._site_handles: list[RemovableHandle] = []
        self._hook_sites()

    def _hook_sites(self) -> None:
        for handle in self._site_handles:
            handle.remove()
        self._site_handles = []
        for site in self._plan.sites:
            module = site.module
            end = ModelHook(self._call_end, module, site)
            self._site_handles.append(
                # Before hooks that replace the output: the rules know the layer's own.
                module.register_forward_hook(end, with_kwargs=True, prepend=True)
            )
            if isinstance(site.rule, ModuleReplay) and site.path:
                start = ModelHook(self._call_start, module, site)
                self._site_handles.append(module.register_forward_pre_hook(start))

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in (*self._handles, *self._site_handles):
            handle.remove()
        self._handles, self._site_handles = [], []

    # ------------------------------------------------------------ the whole model

    def _start(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if silenced(self._listener):
            return
        self._calls, self._rng_states = [], {}
        self._inputs = self.active = None
        self._listener.on_forward_start()
        if not torch.is_grad_enabled():
            return
        if self._plan.refresh():
            self._hook_sites()
        self.active = ForwardPass(batch_size_of((args, kwargs), self._batch_dim))
        if self._wanted.examples:
            self.active.faults.extend(self._obstacles())
            self._inputs = (args, kwargs)
            self._rng_states[""] = [random_state(self._model)]
        if self._wanted.inputs:
            self.active.inputs = (args, kwargs)

    def _obstacles(self) -> list[str]:
        """Why the examples' gradients are not their own, or not to be had."""
        if self.refusal:
            return [self.refusal]
        names = [
            name
            for name, layer in self._batch_norms
            if layer.training or layer.running_mean is None
        ]
        if not names:
            return []
        reason = f"BatchNorm in training mode couples the examples ({names[0]})"
        if self._wanted.refuses_coupling:
            raise CoupledExamplesError(
                "estimator='per_example' needs examples with gradients of their own, "
                f"got a {reason}; use estimator='ghost' with ghost_batch=, or put "
                "BatchNorm in evaluation mode."
            )
        return [reason]

    def _end(self, _: object, args: object, outputs: Any) -> None:
        if silenced(self._listener) or self.active is None:
            return
        for tensor in tensors_of(outputs):
            if tensor.requires_grad:
                hook = partial(self._listener.on_model_grad, self.active)
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        calls, self._calls = self._calls, []
        try:
            self._resolve_all(calls)
        finally:
            self._inputs = None

    # ------------------------------------------------------------ calls of sites

    def _captures(self) -> bool:
        """Whether calls of sites are wanted now."""
        active = self.active
        return (
            self._wanted.examples
            and active is not None
            and active.num_examples is not None
            and not active.faults
            and not silenced(self._listener)
            and torch.is_grad_enabled()
        )

    def _call_start(self, site: object, args: object) -> None:
        if self._captures():
            assert isinstance(site, Site)
            states = self._rng_states.setdefault(site.path, [])
            states.append(random_state(site.module))

    def _call_end(
        self,
        site: object,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Any,  # whatever the module returns
    ) -> None:
        assert isinstance(site, Site)
        if self._smaller is not None:
            self._note_smaller(site, tensors_of((args, kwargs)))
        if not self._captures():
            return
        assert self.active is not None
        rng_state = self._draws(site)
        tensors = tensors_of(outputs)
        if not any(tensor.requires_grad for tensor in tensors):
            return
        captured = captured_call(
            site, self.active, (args, kwargs), len(tensors), rng_state=rng_state
        )
        if self._inputs is not None:
            self._calls.append(captured)
        for position, tensor in enumerate(tensors):
            if tensor.requires_grad:
                hook = partial(self._listener.on_output_grad, captured, position)
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _draws(self, site: Site) -> Tensor | None:
        """The random state before the call, if the call has drawn from it."""
        if not isinstance(site.rule, ModuleReplay):
            return None
        before = self._rng_states[site.path].pop()
        return None if torch.equal(before, random_state(site.module)) else before

    # ------------------------------------------------------------ axes of examples

    def resolve(self, captured: CapturedCall) -> None:
        """Find the axes of the examples, if they are not known yet.

        Raises:
            LayerReadError: If no input has such an axis.
        """
        if not captured.call.axes:
            self._axes.resolve(captured)

    def _resolve_all(self, calls: list[CapturedCall]) -> None:
        try:
            self._resolve_each(calls)
        except BatchSizeError:
            if self._axes.traced:
                raise
            self._axes.trace(calls, self._shapes_of_smaller_batch())
            self._resolve_each(calls)

    def _resolve_each(self, calls: list[CapturedCall]) -> None:
        for captured in calls:
            try:
                self._axes.resolve(captured)
            except LayerReadError as error:
                self._listener.on_unreadable(
                    captured.site, captured.forward_pass, str(error)
                )

    def _shapes_of_smaller_batch(self) -> dict[CallKey, list[torch.Size]]:
        """Run the model once on one example less; it is given back as it was."""
        count = None if self.active is None else self.active.num_examples
        if self._inputs is None or count is None or count < 2:
            return {}
        args, kwargs = one_example_less(self._inputs, count, self._batch_dim)
        self._smaller = {}
        with silence(), model_given_back(self._model), torch.no_grad():
            try:
                self._model(*args, **kwargs)
            except Exception:
                return {}  # a model of one batch size only: sizes have to decide
            else:
                return self._smaller
            finally:
                self._smaller = None

    def _note_smaller(self, site: Site, tensors: list[Tensor]) -> None:
        assert self._smaller is not None
        number = sum(1 for path, _ in self._smaller if path == site.path)
        self._smaller[site.path, number] = [tensor.shape for tensor in tensors]
