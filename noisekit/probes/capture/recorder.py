"""Per-example norms caught in a training step's own backward pass, by hooks alone.

The life of a step: the model's forward opens a pass and each site's call is captured
(``forward``); in the backward pass its output gradients arrive, and once a parameter's
gradient has been accumulated the norms are computed; at the end the gradient's own
norm is taken, before anybody clips it. ``take`` hands over what has gathered.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from noisekit.core.errors import LayerReadError
from noisekit.core.layers.per_example import Site
from noisekit.core.model_copies import copied_parameters, copy_module
from noisekit.probes.capture.accumulation import GradientWatch, gradient_sq_norms
from noisekit.probes.capture.backward_graph_tasks import BackwardTasks
from noisekit.probes.capture.broadcast_nodes import ExampleGradients
from noisekit.probes.capture.calls import fault_of, without_autocast
from noisekit.probes.capture.forward import ForwardCapture
from noisekit.probes.capture.gradient_sum_check import gradient_sum_error
from noisekit.probes.capture.hooks import (
    Faults,
    OnError,
    ParameterHook,
    guarded,
    is_suspended,
    suspend_recording,
)
from noisekit.probes.capture.microbatch_gradients import OwnGradients
from noisekit.probes.capture.replicas import Replicas
from noisekit.probes.capture.signed_backward import SignedBackward
from noisekit.probes.capture.sites import SitePlan, some_of
from noisekit.probes.capture.step_record import (
    CapturedCall,
    ForwardPass,
    GradientListener,
    StepRecord,
    Wanted,
)
from noisekit.probes.capture.targets import eagerly
from noisekit.probes.capture.unit_norms import UnitNorms

_UNSTEPPED = 8
"""Backward passes in a row whose gradients may be zeroed without a step."""
_MOST_FAILURES = 3
"""Readings in which replaying the whole model may fail before it is given up."""


class Recorder:
    """Hooks a model and gathers what its backward passes tell about the examples.

    Attributes:
        model: The model.
        caller: The module whose hooks see its calls, such as a compiled wrapper.
        opaque: By parameter inside a compiled part: the module to be replayed for it.
        replicas: The ranks that train it together.
        names: Names of the parameters that are read.
        parameters: The parameters themselves, in the same order.
        batch_dim: Axis of the examples in the model's input.
        wanted: What the next passes are to be read for.
        plan: Where each parameter is read.
        units: What is read of the layers' calls.
        own_gradients: Gathers the norms of micro-batches' own gradients.
        signed: Runs backward passes with random signs, where they are asked for.
        on_unstepped: Called where gradients are zeroed without any step.
        listener: Told of parameters' calls and of gradients, beside the norms.
        faults: What has gone wrong in this step.
        verified: Whether the closure held when it was last checked, or is known not to.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch_dim: int = 0,
        replicas: Replicas | None = None,
        caller: nn.Module | None = None,
        opaque: Mapping[str, str] | None = None,
        exact_bits: bool = True,
        on_error: OnError = "raise",
    ) -> None:
        self.faults = Faults(on_error)
        self.model = model
        self.caller = model if caller is None else caller
        self.opaque = dict(opaque or {})
        self.replicas = replicas or Replicas()
        self.names = tuple(parameters)
        self.parameters = tuple(parameters.values())
        self.batch_dim = batch_dim
        self.wanted = Wanted()
        self.plan = SitePlan(model, parameters)
        if self.opaque:
            self.plan.replay(self.opaque)
        self.units = UnitNorms(self.plan, self.parameters)
        self.own_gradients = OwnGradients(self.parameters, self)
        self.own_gradients.reduced = self.replicas.wrapped
        self.signed: SignedBackward | None = None
        self.listener: GradientListener | None = None
        self.on_unstepped: Callable[[], None] | None = None
        self.verified = False
        self._has_held, self._num_checks = False, 0
        self._reduces, self._unreduced = True, False
        self._watch = GradientWatch(self.parameters)
        self._tasks = BackwardTasks()
        self._record = StepRecord()
        self._forward = ForwardCapture(
            model,
            self.plan,
            self,
            self.parameters,
            wanted=self.wanted,
            batch_dim=batch_dim,
            caller=caller,
        )
        if not exact_bits:
            self._forward.replace_gradients(self.units)
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                ParameterHook(self._on_accumulated, index)
            )
            for index, parameter in enumerate(self.parameters)
        ]

    @property
    def active(self) -> ForwardPass | None:
        """The last forward pass with gradients, also while it runs."""
        return self._forward.active

    def twin(self) -> "Recorder":
        """Return a recorder of the same parameters of a copy of the model."""
        copied = copy_module(self.model)
        parameters = copied_parameters(self.model, copied, self.parameters)
        named = dict(zip(self.names, parameters, strict=True))
        return Recorder(copied, named, batch_dim=self.batch_dim)

    def refuse_calls(self, reason: str) -> None:
        """Leave the layers' calls alone, and say why wherever they are asked for."""
        self._forward.refusal = reason

    def take(self, *, stepped: bool = True) -> StepRecord:
        """Return what has gathered since the last call, and start anew.

        Args:
            stepped: Whether an optimizer step has used the gradients up; else further
                backward passes add to them.
        """
        record, self._record = self._record, StepRecord()
        if torch._C._current_graph_task_id() != -1:
            record.faults.append("the optimizer steps inside the backward pass")
        if self.faults.reason:
            record.faults.insert(0, self.faults.reason)
            self.faults.reason = ""
        if self._unreduced and record.gradient is not None:
            record.faults.append(
                "the last backward pass was under no_sync(), so that every rank "
                "applies a gradient of its own"
            )
        self.units.start_step()
        if self.signed is not None:
            self.signed.forget()
        if stepped:
            self._watch.after_step()
        return record

    def remove(self) -> None:
        """Take every hook off the model."""
        self._forward.remove()
        self.own_gradients.remove()
        if self.signed is not None:
            self.signed.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---------------------------------------------------------- gradients arriving

    def on_forward_start(self) -> None:
        """Forget backward passes that an exception has broken off."""
        self.replicas.refuse_unjoined()
        self._reduces = self.replicas.reduces()
        self._tasks.forget()
        self.own_gradients.forget()

    def on_changed_model(self) -> None:
        """Check anew whether contributions add up, from this step on."""
        self.verified, self.wanted.closure, self.wanted.split = False, True, True

    @guarded
    def on_model_grad(self, forward_pass: ForwardPass, grad: Tensor) -> None:
        """Note that a backward pass goes through ``forward_pass``."""
        if not is_suspended(self):
            self._enter().visit(forward_pass, twice=grad.requires_grad)

    @guarded
    def on_output_grad(
        self, captured: CapturedCall, position: int, grad: Tensor
    ) -> None:
        """Keep the gradient until those of the site's parameters are complete."""
        if is_suspended(self) or captured.superseded:
            return
        tasks = self._enter()
        tasks.visit(captured.forward_pass, twice=grad.requires_grad)
        tasks.arrived(captured)
        captured.call.grads[position] = grad.detach()
        if self.wanted.closure:
            tasks.closure.note(captured.site.params)

    @guarded
    def on_broadcast_grad(
        self, captured: CapturedCall, grad: Tensor, reader: ExampleGradients
    ) -> None:
        """Add the examples' gradients from one more place where a tensor meets them."""
        earlier = captured.call.grads[0]
        new = captured.task != torch._C._current_graph_task_id()
        self.on_output_grad(captured, 0, grad)
        if captured.call.grads[0] is not None:
            with torch.no_grad():
                rows = reader(grad)
            captured.call.grads[0] = rows if new or earlier is None else earlier + rows

    def on_unreadable(self, site: Site, forward_pass: ForwardPass, reason: str) -> None:
        """Read the site's parameters at a larger module from the next pass on."""
        fault, indices = f"{site.path or 'the model'}: {reason}", []
        for index in self.plan.indices_of(site):
            forward_pass.unread.setdefault(index, fault)
            indices.append(index)
        if not self.plan.widen(indices):
            self.plan.leave_out(indices, fault, after=_MOST_FAILURES)

    def _enter(self) -> BackwardTasks:
        """Notice the first hook of a backward pass, before anything is accumulated."""
        if self._tasks.enter(torch._C._current_graph_task_id()):
            self._record.start(self._watch.before())
            if self._record.num_discarded == _UNSTEPPED and self.on_unstepped:
                self.on_unstepped()
        return self._tasks

    @guarded
    def _on_accumulated(self, index: int) -> None:
        if is_suspended(self):
            return
        tasks = self._tasks
        if tasks.enter(torch._C._current_graph_task_id()):
            self._record.start_unseen()
        if tasks.open():
            end = partial(self._on_backward_end, tasks.task)
            torch.autograd.Variable._execution_engine.queue_callback(end)
            self._record.add(self._passes())
        if not self.wanted.examples or self.faults.reason:
            return
        if len(self.plan.sites_of(index)) > 1:
            tasks.deferred.append(index)  # other layers may still add to it
            if self.replicas.wrapped and self.wanted.closure:
                tasks.closure.keep(self.parameters[index])
        else:
            self._read(index)

    def _passes(self) -> list[ForwardPass]:
        """The passes that the backward pass goes through, as far as hooks can tell."""
        active = self.active
        return self._tasks.passes or ([] if active is None else [active])

    # ------------------------------------------------------------- norms computed

    def _read(self, index: int) -> None:
        """Compute the norms of one parameter, whose gradient is complete."""
        passes = self._passes()
        calls = [
            captured
            for site in self.plan.sites_of(index)
            for captured in self._tasks.calls_of(site)
        ]
        if not calls and any(forward_pass.num_calls for forward_pass in passes):
            self.plan.widen([index])
        if not passes or any(p.faults or index in p.unread for p in passes):
            return
        fault = self._fault(calls, passes, index)
        unread = fault or fault_of(calls, self.names[index])
        for forward_pass in passes:
            if fault:
                forward_pass.faults.append(fault)
            elif unread:
                forward_pass.unread[index] = unread
        if unread:
            return
        try:
            with (
                torch.no_grad(),
                suspend_recording(),
                without_autocast(self.parameters[index]),
                eagerly(bool(self.opaque)),
            ):
                self._compute(index, calls)
        except LayerReadError as error:
            self.on_unreadable(calls[0].site, passes[0], str(error))

    def _fault(
        self, calls: list[CapturedCall], passes: list[ForwardPass], index: int
    ) -> str:
        """Why the passes tell nothing of their examples, if so."""
        if any(p.twice - {self._tasks.task} for p in passes):
            return (
                "the gradient was differentiated once more, as for a gradient penalty, "
                "whose part in it no layer's call tells"
            )
        if len(passes) > 1:
            return f"{len(passes)} forward passes went into one backward pass"
        if index in passes[0].read or any(c.released for c in calls):
            return "two backward passes went through one forward pass"
        return ""

    def _compute(self, index: int, calls: list[CapturedCall]) -> None:
        for captured in calls:
            self._forward.resolve(captured)
        parameter, forward_pass = self.parameters[index], calls[0].forward_pass
        contributions = [(captured.site, captured.call) for captured in calls]
        closure = self.wanted.closure
        sq_norms = self.units.read(index, calls, closure=closure)
        if closure and sq_norms is not None:
            chunks = self.units.chunks_of(calls[0])
            closing = self._tasks.closure
            closing.compare(
                parameter,
                contributions,
                sq_norms,
                chunks=chunks,
                split_from=self._num_checks if self.wanted.split else None,
            )
        if self.wanted.tangents is not None:
            tangent = self.wanted.tangents[self.names[index]]
            forward_pass.inner_products += [
                site.rule.inner_products(call, {site.name_of(parameter): tangent})
                for site, call in contributions
            ]
        if self.listener is not None:
            self.listener.read(index, calls)
        for captured in calls:
            captured.count_read()

    @guarded
    def _on_backward_end(self, task: int) -> None:
        self._tasks.enter(task)
        with torch.no_grad():
            for index in dict.fromkeys(self._tasks.deferred):
                self._read(index)
        if self.replicas.wrapped:
            # The reduction ends in a callback that was queued after this one.
            torch.autograd.Variable._execution_engine.queue_callback(self._on_reduced)
        else:
            self._on_reduced()
        self._commit(task)
        closure = self._tasks.close()
        if self.wanted.examples and self.wanted.closure:
            self._num_checks += 1
            self._judge(closure.failures())

    def _commit(self, task: int) -> None:
        """Note in the forward pass what its own backward pass has brought."""
        passes = self._passes()
        if self.own_gradients.wanted:
            known = None if self.replicas.wrapped else self._record.gradient
            norms = self.own_gradients.take(task, known)
            for forward_pass in passes:
                forward_pass.own_norms += norms
                if len(passes) > 1:
                    forward_pass.own_faults.append(
                        f"{len(passes)} forward passes went into one backward pass"
                    )
        if self.signed is not None:
            self.signed.commit(task)

    @guarded
    def _on_reduced(self) -> None:
        """Take the norm of the gradient as it is applied, before anybody clips it."""
        if self.wanted.gradient:
            with torch.no_grad():
                self._record.gradient = gradient_sq_norms(self.parameters)
                self._record.scaled_gradient = self.units.scaled_sq_norms()
                if self.listener is not None:
                    self.listener.gradient_ready(self._record)
        self._unreduced = not self._reduces
        self._watch.after_backward()

    @guarded
    def clip_factor(self) -> Tensor | float | None:
        """Return by what ``|.grad|`` was multiplied since it was read, if it was."""
        before = self._record.gradient
        if before is None:
            return None
        return self._watch.factor(before, look=self.wanted.closure)

    @guarded
    def before_step(self) -> None:
        """Read a gradient that no backward pass has left, such as one set by hand."""
        if (
            self.wanted.gradient
            and self._record.gradient is None
            and self._watch.changed()
            and any(parameter.grad is not None for parameter in self.parameters)
        ):
            with torch.no_grad():
                self._record.gradient = gradient_sq_norms(self.parameters)
            self._record.faults.insert(
                0, "no backward pass was seen that has left this gradient"
            )

    def _judge(self, failures: set[int]) -> None:
        """Widen the sites whose contributions do not add up, or give up on them."""
        failed = [i for i, p in enumerate(self.parameters) if id(p) in failures]
        if not failed:
            left_out = self.plan.left_out.keys()
            passes = self._record.passes
            if not any(p.faults or p.unread.keys() - left_out for p in passes):
                self.verified = self._has_held = True
            return
        names = some_of([self.names[i] for i in failed])
        fault = f"per-example gradients did not add up to the gradient of {names}"
        for forward_pass in self._record.passes:
            forward_pass.unread |= dict.fromkeys(failed, fault)
        self.verified = not self.plan.widen(failed)
        if self.verified:
            self.plan.leave_out(failed, fault)
        # Where it has held before, training goes on; its readings say what is wrong.
        if self.verified and not self._has_held:
            self.faults.report(gradient_sum_error(names))
