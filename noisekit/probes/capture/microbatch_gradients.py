"""Squared norms of each micro-batch's own gradient, as its backward pass brings it.

A tensor hook of a parameter sees what one backward pass adds to ``.grad``, once and
whole, also for shared weights, compiled models and BatchNorm in training mode. The
first micro-batch of a step leaves its gradient in ``.grad`` itself and costs nothing.
"""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from noisekit.core.layers.rule import widen
from noisekit.core.reductions import sq_norms
from noisekit.probes.capture.hooks import HasFaults, guarded, is_suspended
from noisekit.probes.capture.step_record import Norms

HELD_BYTES = 2**25
"""Gradients kept at a time until one call takes the norms of all: 32 MB."""


class GradientHook:
    """A parameter's hook that calls a method of its owner, as long as that lives."""

    __slots__ = ("_index", "_method")

    def __init__(self, method: Callable[[int, Tensor], None], index: int) -> None:
        self._method = weakref.WeakMethod(method)
        self._index = index

    def __call__(self, grad: Tensor) -> None:
        """Pass the call on."""
        method = self._method()
        if method is not None:
            method(self._index, grad)


class OwnGradients:
    """Gathers the squared norms of the gradients that one backward pass brings.

    Attributes:
        wanted: Whether to gather now.
        reduced: Whether ``.grad`` is summed over ranks before a backward pass ends, so
            that no gradient may be read there.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], owner: HasFaults) -> None:
        self.wanted = False
        self.reduced = False
        self._owner = owner
        self.faults = owner.faults
        self._parameters = parameters
        self._fresh: dict[int, list[int]] = {}
        self._held: dict[int, dict[int, Tensor]] = {}
        self._norms: dict[int, list[Norms]] = {}
        self._bytes = 0
        self._handles: list[RemovableHandle] = []

    def want(self, wanted: bool) -> None:
        """Gather from the next backward pass on, or stop."""
        self.wanted = wanted
        if wanted and not self._handles:
            self._handles = [
                p.register_hook(GradientHook(self._on_gradient, i))  # type: ignore[no-untyped-call]
                for i, p in enumerate(self._parameters)
            ]

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def forget(self) -> None:
        """Drop what no backward pass has taken, such as that of ``autograd.grad``."""
        self._fresh, self._held, self._norms, self._bytes = {}, {}, {}, 0

    def take(self, task: int, gradient: Tensor | None) -> list[Norms]:
        """Return the norms that graph task ``task`` has brought, and forget them.

        Args:
            task: The run of the autograd engine that ends.
            gradient: Squared norms of ``.grad`` of all parameters, if already known.
        """
        self._settle(task)
        found = self._norms.pop(task, [])
        fresh = self._fresh.pop(task, [])
        if gradient is not None and len(fresh) == len(self._parameters):
            found.append((tuple(range(len(fresh))), gradient))
        elif fresh:
            grads = [self._parameters[index].grad for index in fresh]
            own = [grad for grad in grads if grad is not None]
            found.append((tuple(fresh), _sq_norms(own)))
        return found

    @guarded
    def _on_gradient(self, index: int, grad: Tensor) -> None:
        if not self.wanted or is_suspended(self._owner):
            return
        task = torch._C._current_graph_task_id()
        if self._parameters[index].grad is None and not self.reduced:
            # Not kept: a second reference would make ``.grad`` a copy.
            self._fresh.setdefault(task, []).append(index)
            return
        held = self._held.setdefault(task, {})
        if index in held:
            self._settle(task)
            held = self._held.setdefault(task, {})
        held[index] = grad.detach()
        self._bytes += grad.numel() * grad.element_size()
        if self._bytes > HELD_BYTES:
            self._settle(task)

    def _settle(self, task: int) -> None:
        held = self._held.pop(task, {})
        self._bytes = 0
        if held:
            norms = self._norms.setdefault(task, [])
            norms.append((tuple(held), _sq_norms(list(held.values()))))


def _sq_norms(grads: Sequence[Tensor]) -> Tensor:
    return sq_norms([widen(grad) for grad in grads])
