"""Objects whose contents can be restored in place: they stay the same objects."""

import pickle
import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
)


class Content(ABC):
    """Something whose contents can change while it stays the same object."""

    __slots__ = ()

    @abstractmethod
    def has_changed(self) -> bool:
        """Whether it is not as it was."""

    @abstractmethod
    def restore(self) -> None:
        """Make it as it was."""


class MappingContent(Content):
    """A dictionary, such as the attributes of an object."""

    __slots__ = ("before", "identities", "mapping")

    def __init__(self, mapping: dict[Any, Any]) -> None:
        self.mapping = mapping
        self.before = dict(mapping)  # which keeps them alive, so that ids stay unique
        self.identities = _identities(mapping)

    def has_changed(self) -> bool:
        """Whether it is not as it was."""
        return _identities(self.mapping) != self.identities

    def restore(self) -> None:
        """Make it as it was."""
        if self.has_changed():
            # Subclasses may refuse or change what is put into them.
            ordered = isinstance(self.mapping, OrderedDict)
            base = OrderedDict if ordered else dict
            base.clear(self.mapping)
            for key, value in self.before.items():
                base.__setitem__(self.mapping, key, value)


def _identities(mapping: dict[Any, Any]) -> list[int]:
    """Return the ids of keys and values, in order; values need not be comparable."""
    return [*map(id, mapping), *map(id, mapping.values())]


class ItemsContent(Content):
    """A list, a deque or a set."""

    def __init__(self, items: Any) -> None:
        self.items = items
        self.before = list(items)

    def has_changed(self) -> bool:
        """Whether it is not as it was."""
        return len(self.items) != len(self.before) or any(
            a is not b for a, b in zip(self.items, self.before, strict=True)
        )

    def restore(self) -> None:
        """Make it as it was."""
        if self.has_changed():
            self.items.clear()
            add = (
                self.items.update if isinstance(self.items, set) else self.items.extend
            )
            add(self.before)


class SlotContent(Content):
    """An attribute of an object that has slots."""

    def __init__(self, owner: object, name: str, value: object) -> None:
        self.owner, self.name, self.value = owner, name, value

    def has_changed(self) -> bool:
        """Whether it is not as it was."""
        return getattr(self.owner, self.name, None) is not self.value

    def restore(self) -> None:
        """Make it as it was."""
        if self.has_changed():
            object.__setattr__(self.owner, self.name, self.value)


class ValueContent(Content):
    """A random generator or an array, whose contents are compared by value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.before = self._read()

    def has_changed(self) -> bool:
        """Whether it is not as it was."""
        return pickle.dumps(self._read()) != pickle.dumps(self.before)

    def restore(self) -> None:
        """Make it as it was."""
        value, before = self.value, self.before
        if isinstance(value, np.ndarray):
            if value.flags.writeable:
                np.copyto(value, before)
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = before
        elif isinstance(value, random.Random):
            value.setstate(before)
        else:
            value.set_state(before)

    def _read(self) -> Any:
        value = self.value
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, np.random.Generator):
            return value.bit_generator.state
        if isinstance(value, random.Random):
            return value.getstate()
        return value.get_state()


class TensorContent:
    """A tensor with the memory, the gradient and the hooks that it had."""

    __slots__ = (
        "data",
        "grad",
        "hooks",
        "requires_grad",
        "tensor",
        "version",
    )

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.data = tensor.data
        self.version = None if tensor.is_inference() else tensor._version
        self.requires_grad = tensor.requires_grad
        self.grad = tensor.grad
        self.hooks = _user_hooks(tensor)

    def set_aside(self, *, copy: bool) -> None:
        """Put a copy in the place of its memory, and its gradient and hooks away."""
        if copy and self.data.layout is torch.strided:
            self.tensor.data = self.data.clone()
        if self.grad is not None:
            self.tensor.grad = None
        self.hold_hooks()

    def hold_hooks(self) -> None:
        """Put the hooks away."""
        for name in self.hooks:
            setattr(self.tensor, name, None)

    def restore_hooks(self) -> None:
        """Put the hooks back."""
        for name, hooks in self.hooks.items():
            setattr(self.tensor, name, hooks)

    def restore(self) -> None:
        """Make it as it was."""
        tensor = self.tensor
        tensor.data = self.data
        if self.version is not None and tensor._version != self.version:
            # So that a graph of the training that holds this tensor stays valid.
            torch._C._autograd._unsafe_set_version_counter((tensor,), (self.version,))
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if tensor.grad is not self.grad:
            tensor.grad = self.grad
        self.restore_hooks()


def _user_hooks(tensor: Tensor) -> dict[str, Any]:
    """Hooks on a parameter that change its gradient or act on it, but not ours.

    The derivative of a loss is what it is without them.
    """
    found = {}
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(tensor, name, None)
        if hooks and not all(_is_ours(hook) for hook in hooks.values()):
            found[name] = hooks
    return found


def _is_ours(hook: object) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("noisekit.")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, not-a-numbers included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())
