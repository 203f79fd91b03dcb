"""Per-example norms caught in a training step's own backward pass, by hooks alone.

The life of a step: the model's forward opens a pass and each site's call is captured
(``forward``); in the backward pass its output gradients arrive, and once a parameter's
gradient has been accumulated the norms are computed; at the end the gradient's own
norm is taken, before anybody clips it. ``take`` hands over what has gathered.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from noisekit.core.errors import ClosureError, LayerReadError
from noisekit.core.layer_rules import widen
from noisekit.core.per_example import Site, example_sq_norms
from noisekit.probes.accumulation import GradientWatch
from noisekit.probes.capture import versions_of
from noisekit.probes.forward import ForwardCapture, Wanted
from noisekit.probes.hooks import ParameterHook
from noisekit.probes.passes import CapturedCall, ForwardPass, StepRecord
from noisekit.probes.silence import silence, silenced
from noisekit.probes.sites import SitePlan
from noisekit.probes.tasks import BackwardTasks


class Recorder:
    """Hooks a model and gathers what its backward passes tell about the examples.

    Attributes:
        model: The model.
        names: Names of the parameters that are read.
        parameters: The parameters themselves, in the same order.
        batch_dim: Axis of the examples in the model's input.
        wanted: What the next passes are to be read for.
        plan: Where each parameter is read.
        verified: Whether the closure held when it was last checked, or is known not to.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch_dim: int = 0,
    ) -> None:
        self.model = model
        self.names = tuple(parameters)
        self.parameters = tuple(parameters.values())
        self.batch_dim = batch_dim
        self.wanted = Wanted()
        self.plan = SitePlan(model, parameters)
        self.verified = False
        self._has_held = False
        self._watch = GradientWatch(self.parameters)
        self._tasks = BackwardTasks()
        self._record = StepRecord()
        self._forward = ForwardCapture(
            model, self.plan, self, wanted=self.wanted, batch_dim=batch_dim
        )
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
        """Return another recorder of the same parameters, with nothing gathered."""
        named = dict(zip(self.names, self.parameters, strict=True))
        return Recorder(self.model, named, batch_dim=self.batch_dim)

    def take(self, *, stepped: bool = True) -> StepRecord:
        """Return what has gathered since the last call, and start anew.

        Args:
            stepped: Whether an optimiser step has used the gradients up; else further
                backward passes add to them.
        """
        record, self._record = self._record, StepRecord()
        if stepped:
            self._watch.after_step()
        return record

    def remove(self) -> None:
        """Take every hook off the model."""
        self._forward.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---------------------------------------------------------- gradients arriving

    def on_forward_start(self) -> None:
        """Forget backward passes that an exception has broken off."""
        self._tasks.forget()

    def on_model_grad(self, forward_pass: ForwardPass, grad: Tensor) -> None:
        """Note that a backward pass goes through ``forward_pass``."""
        if not silenced(self):
            self._enter().visit(forward_pass)

    def on_output_grad(
        self, captured: CapturedCall, position: int, grad: Tensor
    ) -> None:
        """Keep the gradient until those of the site's parameters are complete."""
        if silenced(self):
            return
        tasks = self._enter()
        tasks.visit(captured.forward_pass)
        tasks.arrived(captured)
        captured.call.grads[position] = grad.detach()
        if self.wanted.closure:
            tasks.closure.note(captured.site.params)

    def on_unreadable(self, site: Site, forward_pass: ForwardPass, reason: str) -> None:
        """Read the site's parameters at a larger module from the next pass on."""
        forward_pass.faults.append(f"{site.path or 'the model'}: {reason}")
        self.plan.widen(self.plan.indices_of(site))

    def _enter(self) -> BackwardTasks:
        """Notice the first hook of a backward pass, before anything is accumulated."""
        if self._tasks.enter(torch._C._current_graph_task_id()):
            self._record.start(self._watch.before())
        return self._tasks

    def _on_accumulated(self, index: int) -> None:
        if silenced(self):
            return
        tasks = self._tasks
        if tasks.enter(torch._C._current_graph_task_id()):
            self._record.start_unseen()
        if tasks.open():
            end = partial(self._on_backward_end, tasks.task)
            torch.autograd.Variable._execution_engine.queue_callback(end)
            self._record.add(self._passes())
        if not self.wanted.examples:
            return
        if len(self.plan.sites_of(index)) > 1:
            tasks.deferred.append(index)  # other layers may still add to it
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
        if any(forward_pass.faults for forward_pass in passes):
            return
        fault = self._fault(calls, passes, index)
        if fault:
            for forward_pass in passes:
                forward_pass.faults.append(fault)
            return
        try:
            with torch.no_grad(), silence(), _no_autocast(self.parameters[index]):
                self._compute(index, calls)
        except LayerReadError as error:
            self.on_unreadable(calls[0].site, passes[0], str(error))

    def _fault(
        self, calls: list[CapturedCall], passes: list[ForwardPass], index: int
    ) -> str:
        """Why the captured calls do not tell this parameter's norms, if so."""
        name = self.names[index]
        if not calls:
            return f"no call of the module that owns {name} reached the loss"
        if len(passes) > 1:
            return f"{len(passes)} forward passes went into one backward pass"
        if index in passes[0].sq_norms or any(c.released for c in calls):
            return "two backward passes went through one forward pass"
        if any(c.versions != versions_of(c.call) for c in calls):
            return f"an input of {calls[0].site.path} was written to after its use"
        return ""

    def _compute(self, index: int, calls: list[CapturedCall]) -> None:
        parameter, forward_pass = self.parameters[index], calls[0].forward_pass
        for captured in calls:
            self._forward.resolve(captured)
        contributions = [(captured.site, captured.call) for captured in calls]
        if len(calls) == 1:
            among = self.plan.sole_names(calls[0].site)
            sq_norms = calls[0].sq_norms_of(parameter, among)
        else:
            sq_norms = example_sq_norms(contributions, parameter)
        forward_pass.sq_norms[index] = sq_norms
        if self.wanted.closure:
            self._tasks.closure.compare(parameter, contributions, sq_norms)
        if self.wanted.tangents is not None:
            tangent = self.wanted.tangents[self.names[index]]
            forward_pass.inner_products += [
                site.rule.inner_products(call, {site.name_of(parameter): tangent})
                for site, call in contributions
            ]

    def _on_backward_end(self, task: int) -> None:
        self._tasks.enter(task)
        with torch.no_grad():
            for index in dict.fromkeys(self._tasks.deferred):
                self._read(index)
            if self.wanted.gradient:
                self._record.gradient = gradient_sq_norms(self.parameters)
        self._watch.after_backward()
        closure = self._tasks.close()
        if self.wanted.examples and self.wanted.closure:
            self._judge(closure.failures())

    def _judge(self, failures: set[int]) -> None:
        """Widen the sites whose contributions do not add up, or give up on them."""
        failed = [i for i, p in enumerate(self.parameters) if id(p) in failures]
        if not failed:
            if not any(p.faults for p in self._record.passes):
                self.verified = self._has_held = True
            return
        names = ", ".join(self.names[i] for i in failed)
        fault = f"per-example gradients did not add up to the gradient of {names}"
        for forward_pass in self._record.passes:
            forward_pass.faults.append(fault)
        self.verified = not self.plan.widen(failed)
        if self.verified:
            self._forward.refusal = fault
        # Where it has held before, training goes on; its readings say what is wrong.
        if self.verified and not self._has_held:
            raise ClosureError(
                "a probe needs per-example gradients that add up to .grad, got another "
                f"gradient for {names}. A penalty on the weights inside the loss, a "
                "gradient penalty or a hook that changes gradients does this; use the "
                "optimiser's weight_decay, or leave these parameters out with params=."
            )


def gradient_sq_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return ``|.grad|²`` per parameter, zero where there is none.

    In float32 or wider: squares of half-precision gradients overflow.
    """
    found = [(i, p.grad) for i, p in enumerate(parameters) if p.grad is not None]
    norms = torch._foreach_norm([widen(grad) for _, grad in found])
    sq_norms = torch.stack(norms).square_()
    if len(found) == len(parameters):
        return sq_norms
    index = torch.tensor([i for i, _ in found], device=sq_norms.device)
    return sq_norms.new_zeros(len(parameters)).index_copy_(0, index, sq_norms)


def _no_autocast(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """Exact norms also where the user calls ``backward`` under autocast."""
    kind = parameter.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
