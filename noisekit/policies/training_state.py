"""Host copies of what a training step changes, to put it back bit for bit."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from noisekit.core.arguments import shown
from noisekit.core.errors import UsageError
from noisekit.core.model_state import ModelState
from noisekit.core.randomness import preserve_rng_state


@runtime_checkable
class HasState(Protocol):
    """A scheduler, a gradient scaler, and the like."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state."""


@contextmanager
def preserve_training_state(objects: Iterable[object]) -> Iterator[None]:
    """Restore modules, optimizers, other stateful objects and random states on exit.

    Copies are on the host, so that they take no memory of the device; tensors stay the
    same objects. Gradients are away in between.

    Args:
        objects: Modules, optimizers, and objects with ``state_dict`` and
            ``load_state_dict``.

    Raises:
        UsageError: If one of them is neither.
    """
    given = tuple(objects)
    for value in given:
        if not isinstance(value, HasState):
            raise UsageError(
                "restore needs modules, optimizers, or objects with state_dict and "
                f"load_state_dict, got {shown(value)}; leave it out."
            )
    modules = [value for value in given if isinstance(value, nn.Module)]
    optimizers = [value for value in given if isinstance(value, torch.optim.Optimizer)]
    others = [
        (value, copy.deepcopy(value.state_dict()))
        for value in given
        if isinstance(value, HasState)
        and not isinstance(value, nn.Module | torch.optim.Optimizer)
    ]
    contents = ModelState(*modules)
    held: list[_HeldTensor | _HeldOptimizer] = []
    held += [_HeldTensor(tensor) for tensor in contents.tensors]
    held += [_HeldOptimizer(optimizer) for optimizer in optimizers]
    with preserve_rng_state():
        try:
            yield
        finally:
            contents.reset([])
            for one in held:
                one.restore()
            for value, state in others:
                value.load_state_dict(state)


class _HeldTensor:
    """A tensor, a copy of its values, and its gradient, which is away."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._data = tensor.data
        self._copy = tensor.detach().to("cpu", copy=True)
        self._requires_grad = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        if self._grad is not None:
            tensor.grad = None

    def restore(self) -> None:
        """Put values and gradient back."""
        tensor = self._tensor
        tensor.data = self._data  # a step may have put other memory there
        tensor.data.copy_(self._copy)
        if tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        if tensor.is_leaf and tensor.grad is not self._grad:
            tensor.grad = self._grad


class _HeldOptimizer:
    """The buffers and the groups of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [
            {key: _held(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._state = {
            parameter: {key: _held(value) for key, value in buffers.items()}
            for parameter, buffers in optimizer.state.items()
        }

    def restore(self) -> None:
        """Put buffers and groups back; what the steps have made is gone."""
        state = self._optimizer.state
        state.clear()
        for parameter, buffers in self._state.items():
            state[parameter] = {key: _value(held) for key, held in buffers.items()}
        for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key in group.keys() - kept.keys() - {"params"}:
                del group[key]
            group.update({key: _value(held) for key, held in kept.items()})


def _held(value: object) -> object:
    return _HeldTensor(value) if isinstance(value, Tensor) else copy.deepcopy(value)


def _value(held: object) -> object:
    if not isinstance(held, _HeldTensor):
        return held
    held.restore()
    return held._tensor
