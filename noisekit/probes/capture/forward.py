"""The forward side of a probe: passes opened, calls of sites captured."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from noisekit.core.errors import CoupledExamplesError, LayerReadError, ModelCopyError
from noisekit.core.layers.call_state import CallState
from noisekit.core.layers.per_example import Site, coupling
from noisekit.core.layers.replay import ModuleReplay
from noisekit.probes.capture.broadcast_nodes import ExampleGradients
from noisekit.probes.capture.broadcasts import Broadcasts, may_be_shared
from noisekit.probes.capture.calls import (
    batch_size_of,
    captured_call,
    tensors_of,
    unreadable_inputs,
)
from noisekit.probes.capture.example_axes import ExampleAxes
from noisekit.probes.capture.fused_weight_grads import Replacement
from noisekit.probes.capture.hooks import (
    Faults,
    ModelHook,
    guarded,
    is_suspended,
    suspend_recording,
)
from noisekit.probes.capture.independence import IndependenceCheck
from noisekit.probes.capture.loss_counts import CountSchedule, LossCounts
from noisekit.probes.capture.sites import SitePlan
from noisekit.probes.capture.step_record import (
    CallKey,
    CapturedCall,
    ForwardPass,
    Wanted,
)
from noisekit.probes.capture.structure import Structure
from noisekit.probes.capture.unit_norms import UnitNorms


class Listener(Protocol):
    """The backward side, which receives captured calls and output gradients."""

    faults: Faults

    def on_forward_start(self) -> None:
        """A new pass begins; no backward pass is under way."""

    def on_changed_model(self) -> None:
        """Hooks, forwards or parametrisations are others than in the last pass."""

    def on_model_grad(self, forward_pass: ForwardPass, grad: Tensor) -> None:
        """The gradient of one of the model's outputs has arrived."""

    def on_output_grad(
        self, captured: CapturedCall, position: int, grad: Tensor
    ) -> None:
        """The gradient of one of a site's outputs has arrived."""

    def on_broadcast_grad(
        self, captured: CapturedCall, grad: Tensor, reader: ExampleGradients
    ) -> None:
        """The gradient of a result has arrived in which a tensor meets the examples."""

    def on_unreadable(self, site: Site, forward_pass: ForwardPass, reason: str) -> None:
        """A site's call does not determine per-example gradients."""


class ForwardCapture:
    """Hooks a model's forward pass and captures the calls of its sites.

    A site is a module with parameters that are read: a layer with a rule, or a module
    that is replayed. The forward hook of a site stores the inputs of a call, and tensor
    hooks on its outputs pass their gradients to the listener: together they determine
    the per-example gradients ``u_i`` of the site's parameters.

    Attributes:
        active: The last pass with gradients, also while it runs.
        refusal: Why no pass can be read any more; empty while passes can.
        faults: What has gone wrong in this step.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SitePlan,
        listener: Listener,
        parameters: Sequence[nn.Parameter],
        *,
        wanted: Wanted,
        batch_dim: int,
        caller: nn.Module | None = None,
    ) -> None:
        self.active: ForwardPass | None = None
        self.refusal = ""
        self.faults = listener.faults
        self._model = model
        self._caller = model if caller is None else caller
        self._plan = plan
        self._listener = listener
        self._wanted = wanted
        self._batch_dim = batch_dim
        self._couplers = [
            (name, m)
            for name, m in model.named_modules()
            if isinstance(m, _BatchNorm | nn.Embedding | nn.EmbeddingBag)
        ]
        self._axes = ExampleAxes()
        self._broadcasts = Broadcasts(
            plan, self._axes.of_meetings, listener.on_broadcast_grad
        )
        self._sources: dict[CallKey, Node] = {}
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._calls: list[CapturedCall] = []
        self._states: dict[Site, list[CallState]] = {}
        self._counting = CountSchedule()
        self._coupling: dict[bool, str] = {}
        caller = self._caller
        start, end = ModelHook(self._start, caller), ModelHook(self._end, caller)
        self._handles: list[RemovableHandle] = [
            caller.register_forward_pre_hook(start, with_kwargs=True, prepend=True),
            caller.register_forward_hook(end),
        ]
        self._site_handles: list[RemovableHandle] = []
        self._replacement: Replacement | None = None
        self._hook_sites()
        self._structure = Structure(model, parameters)

    def replace_gradients(self, units: UnitNorms) -> None:
        """Have weight gradients computed from the parts that ``units`` reads."""
        self._replacement = Replacement(self._plan, units, self._captures)
        self._hook_sites()
        self._structure.refresh()

    def _hook_sites(self) -> None:
        for handle in self._site_handles:
            handle.remove()
        self._site_handles = []
        for site in self._plan.sites:
            module = site.module if site.path else self._caller
            end = ModelHook(self._call_end, module, site)
            self._site_handles.append(
                # First: a later hook may replace the output, while the rules need the
                # gradient of the layer's own.
                module.register_forward_hook(end, with_kwargs=True, prepend=True)
            )
            if isinstance(site.rule, ModuleReplay) and site.path:
                start = ModelHook(self._call_start, module, site)
                self._site_handles.append(
                    # First: other hooks may compute a weight, and write to buffers for
                    # it (spectral norm), which a replay has to repeat.
                    module.register_forward_pre_hook(start, prepend=True)
                )
            if self._replacement is not None:
                self._site_handles += self._replacement.hook(site)

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in (*self._handles, *self._site_handles):
            handle.remove()
        self._handles, self._site_handles = [], []
        if self._replacement is not None:
            self._replacement.give_back()

    # ------------------------------------------------------------ the whole model

    @guarded
    def _start(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_suspended(self._listener):
            return
        self._forget()
        self._listener.on_forward_start()
        if not torch.is_grad_enabled():
            return
        if self._wanted.examples:
            self._follow_changes()
        self.active = ForwardPass(batch_size_of((args, kwargs), self._batch_dim))
        self.active.unread.update(self._plan.left_out)
        self.active.faults.extend(unreadable_inputs((args, kwargs)))
        if self._wanted.examples:
            self._note_obstacles(self.active)
            self._inputs = (args, kwargs)
            for site in self._plan.sites:
                if isinstance(site.rule, ModuleReplay) and not site.path:
                    self._note_state(site)
        if self._wanted.inputs:
            self.active.inputs = (args, kwargs)

    def _follow_changes(self) -> None:
        """Hook sites anew where the model, or the plan of its sites, has changed."""
        if self._structure.has_changed():
            self._plan.forget_broadcasts()
            self._axes.restart()
            self._listener.on_changed_model()
        if self._plan.refresh():
            self._hook_sites()
            self._structure.refresh()

    def _forget(self) -> None:
        """Drop what an exception in the last pass may have left."""
        self._calls, self._states, self._sources = [], {}, {}
        self._inputs = self.active = None
        if self._replacement is not None:
            self._replacement.give_back()

    def _note_obstacles(self, active: ForwardPass) -> None:
        """Note why the examples' gradients are not their own, or not to be had.

        Raises:
            CoupledExamplesError: If the estimator asked for needs them.
        """
        known = self._coupling.get(self._model.training, "")
        if known:
            active.refuse_coupled(known)
        if self.refusal:
            active.faults.append(self.refusal)
        if active.faults:
            return
        found = ((name, coupling(module)) for name, module in self._couplers)
        name, cause = next(((name, cause) for name, cause in found if cause), ("", ""))
        if not cause:
            return
        reason = f"{cause} couples the examples ({name})"
        if self._wanted.refuses_coupling:
            norm = cause.startswith("BatchNorm")
            remedy = "put BatchNorm in evaluation mode" if norm else "switch that off"
            raise CoupledExamplesError(
                f"estimator={self._wanted.refuses_coupling!r} needs examples with "
                f"gradients of their own, but {reason}; read micro-batches by "
                "estimator='accumulation', use estimator='ghost' with ghost_batch=, "
                f"or {remedy}."
            )
        active.refuse_coupled(reason)

    @guarded
    def _end(self, _: object, args: object, outputs: Any) -> None:
        if is_suspended(self._listener) or self.active is None:
            return
        counts = self._wanted.examples and self._counting.is_due()
        for position, tensor in enumerate(tensors_of(outputs)):
            if tensor.requires_grad:
                kept = (
                    tensor.detach() if counts and self._counting.fits(tensor) else None
                )
                hook = partial(self._on_output_grad, self.active, position, kept)
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        calls, self._calls = self._calls, []
        try:
            is_news = self._establish(calls)
            self._resolve_each(calls, tensors_of(outputs), is_news=is_news)
        finally:
            self._inputs, self._sources = None, {}

    # ------------------------------------------------------------ calls of sites

    def _captures(self) -> bool:
        """Whether calls of sites are wanted now."""
        active = self.active
        return (
            self._wanted.examples
            and active is not None
            and active.num_examples is not None
            and not active.faults
            and not self.faults.reason
            and not is_suspended(self._listener)
            and torch.is_grad_enabled()
        )

    @guarded
    def _call_start(self, site: object, args: object) -> None:
        if self._captures():
            assert isinstance(site, Site)
            assert isinstance(site.rule, ModuleReplay)
            self._note_state(site)

    def _note_state(self, site: Site) -> None:
        """Store the state that a replay of the call depends on, before the call."""
        assert self.active is not None
        try:
            state = CallState.of(site.module)
        except ModelCopyError as error:
            self.active.faults.append(f"{site.path or 'the model'}: {error}")
        else:
            self._states.setdefault(site, []).append(state)

    @guarded
    def _call_end(
        self,
        site: object,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Any,  # whatever the module returns
    ) -> None:
        assert isinstance(site, Site)
        if not self._captures():
            return
        tensors = tensors_of(outputs)
        captured = self._captured(site, (args, kwargs), tensors)
        if captured is None:
            return
        if self._replacement is not None:
            self._replacement.link(captured)
        if self._inputs is not None:
            self._calls.append(captured)
            if may_be_shared(site) and tensors[0].grad_fn is not None:
                self._sources[captured.key] = tensors[0].grad_fn
        for position, tensor in enumerate(tensors):
            if tensor.requires_grad:
                hook = partial(self._listener.on_output_grad, captured, position)
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _captured(
        self,
        site: Site,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        outputs: list[Tensor],
    ) -> CapturedCall | None:
        """The call, with the state before it or the statistics that its rule needs."""
        assert self.active is not None
        states = self._states.get(site, [])
        before = states.pop() if states else None
        replayed = isinstance(site.rule, ModuleReplay)
        if not any(t.requires_grad for t in outputs) or (replayed and before is None):
            return None  # without a gradient, or started while capture was off
        captured = captured_call(site, self.active, inputs, len(outputs))
        if isinstance(site.rule, ModuleReplay) and before is not None:
            site.rule.note_state(captured.call, before)
        else:
            captured.call.statistics = site.rule.statistics(outputs[0])
        return captured

    # ------------------------------------------------------------ axes of examples

    def resolve(self, captured: CapturedCall) -> None:
        """Find the axes of the examples, if they are not known yet.

        Raises:
            LayerReadError: If no input has such an axis.
        """
        if not captured.call.axes:
            self._axes.resolve(captured)

    def _establish(self, calls: list[CapturedCall]) -> bool:
        """Check, on a schedule, which rows belong to which example.

        Copies of the model are run with other values for some examples: rows of outputs
        and of sites' inputs that change belong to these, and a change elsewhere shows
        that examples are coupled.

        Returns:
            Whether the check has run, so that axes may have changed.
        """
        active = self.active
        assert active is not None
        num_examples = active.num_examples
        if self._inputs is None or num_examples in (None, 0, 1) or not calls:
            return False
        with suspend_recording():
            found = self._axes.establish(calls, self._check)
        if found is not None and found.refusal:
            self._coupling[self._model.training] = found.refusal
            active.refuse_coupled(found.refusal)
        if self._axes.unchecked:
            active.notes.append(
                f"independence of examples not checked: {self._axes.unchecked}"
            )
        return found is not None

    def _check(self, halves: torch.Generator | None) -> IndependenceCheck:
        """A check of the pass that has just ended."""
        assert self.active is not None
        assert self.active.num_examples is not None
        assert self._inputs is not None
        return IndependenceCheck(
            self._model,
            self._plan.sites,
            self._inputs,
            num_examples=self.active.num_examples,
            batch_dim=self._batch_dim,
            halves=halves,
        )

    @guarded
    def _on_output_grad(
        self,
        forward_pass: ForwardPass,
        position: int,
        outputs: Tensor | None,
        grad: Tensor | None,
    ) -> None:
        """An output's gradient has arrived: the output is part of the loss."""
        if grad is None or is_suspended(self._listener):
            return  # compiled code passes None for outputs that are not used
        reason = self._axes.coupled.get(position, "")
        if reason:
            self._coupling[self._model.training] = reason
            forward_pass.refuse_coupled(reason)
        self._listener.on_model_grad(forward_pass, grad)
        axis = self._axes.of_outputs.get(position, self._batch_dim)
        if outputs is not None and outputs.shape[axis] == forward_pass.num_examples:
            forward_pass.counts = LossCounts.of(outputs, grad, axis)
            self._counting.checked(forward_pass.counts)

    def _resolve_each(
        self, calls: list[CapturedCall], outputs: Sequence[Tensor], *, is_news: bool
    ) -> None:
        """Find the examples of every call, or else where its output meets them."""
        active = self.active
        assert active is not None
        unclear: dict[CallKey, tuple[CapturedCall, str]] = {}
        for captured in calls:
            try:
                self._axes.resolve(captured)
            except LayerReadError as error:
                unclear[captured.key] = (captured, str(error))
        shared = {
            self._sources[key]: captured
            for key, (captured, _) in unclear.items()
            if key in self._sources
        }
        read = self._broadcasts.follow(outputs, shared, active, search=is_news)
        for key, (captured, reason) in unclear.items():
            if key not in read and self._plan.indices_of(captured.site):
                self._listener.on_unreadable(captured.site, active, reason)
        if is_news and self._plan.stale:
            left = [c for c in calls if self._plan.indices_of(c.site)]
            self._axes.leave_out(left)
