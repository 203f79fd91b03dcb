"""An optimizer's steps, and what was done to the gradient between backward and step."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from noisekit.probes.capture.hooks import guarded, is_suspended
from noisekit.probes.capture.recorder import Recorder


class OptimizerSteps:
    """Calls back after every step that an optimizer takes.

    A step with a closure evaluates gradients itself, LBFGS several times: what was
    read last counts.

    Attributes:
        num_evaluations: Evaluations of the last step's closure; 0 without one.
        optimizer: The optimizer.
        clip_factor: What the gradient's norm was multiplied by since it was read, in
            the last step; ``None`` where no gradient was read.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        recorder: Recorder,
        scaler: "torch.amp.GradScaler | None",
        after: Callable[[], None],
    ) -> None:
        self.num_evaluations = 0
        self.clip_factor: Tensor | float | None = None
        self.optimizer = optimizer
        self._recorder = recorder
        self.faults = recorder.faults
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._after = after
        self._num_at_first = self._num_trainable()
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._on_start),
            optimizer.register_step_post_hook(self._on_end),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def notes(self) -> tuple[str, ...]:
        """Return what a reader must know of the step that has been taken."""
        notes = []
        if self.num_evaluations > 1:
            notes.append(f"the last of {self.num_evaluations} evaluations in the step")
        joined = self._num_trainable() - self._num_at_first
        if joined > 0:
            notes.append(
                f"{joined} parameters became trainable after the probe was attached "
                "and are not read: attach anew"
            )
        return tuple(notes)

    @property
    def found_inf(self) -> Tensor | None:
        """Whether a fused optimizer has skipped the step, which only the device knows.

        Others are not called for such a step.
        """
        found_inf = getattr(self.optimizer, "found_inf", None)
        if self._scaler is None or not isinstance(found_inf, Tensor):
            return None
        return found_inf

    def _num_trainable(self) -> int:
        groups = self.optimizer.param_groups
        return sum(p.requires_grad for group in groups for p in group["params"])

    @property
    def loss_scale(self) -> Tensor | None:
        """The factor of loss scaling in the gradients that a backward pass leaves."""
        scaler = self._scaler
        return None if scaler is None else scaler._get_scale_async()  # never waits

    def _on_start(
        self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _is_nested(self.optimizer) or is_suspended(self._recorder):
            return None
        self.num_evaluations, self.clip_factor = 0, None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._recorder.before_step()
            self._note_clipping()
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._watched(closure)}
        return (args[0], self._watched(closure), *args[2:]), kwargs

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with a look at the gradient that each evaluation leaves."""

        def evaluate() -> Any:  # the loss, or what the user returns
            loss = closure()
            self.num_evaluations += 1
            self._note_clipping()
            return loss

        return evaluate

    def _on_end(self, *_: object) -> None:
        if not (_is_nested(self.optimizer) or is_suspended(self._recorder)):
            self._after()

    @guarded
    def _note_clipping(self) -> None:
        factor = self._recorder.clip_factor()
        scale = self.loss_scale
        # A fused optimizer unscales in its own kernel, after this.
        scaled = getattr(self.optimizer, "grad_scale", None) is not None
        if isinstance(factor, Tensor) and scale is not None and not scaled:
            factor = factor * scale
        self.clip_factor = factor


def is_attached(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a probe reads the optimizer's steps already."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    return any(isinstance(getattr(h, "__self__", 0), OptimizerSteps) for h in hooks)


def _is_nested(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the hook that asks belongs to a step inside one of the same optimizer.

    A subclass may call the step of its base, which has hooks of its own. Frames tell,
    since a counter would be wrong for good after a step that has failed.
    """
    step = sys._getframe(2)
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False
