"""A snapshot of a model's state: tensors, attributes, containers, random generators.

A forward pass may change anything that it can reach: parameters (data-dependent
initialisation, momentum encoders, ``max_norm``), buffers, plain tensors, counters,
queues, helper objects and generators. The snapshot follows the references from the
modules, so that all of those are restored.
"""

import inspect
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from noisekit.core.randomness import preserve_rng_state
from noisekit.core.restorable import (
    GENERATORS,
    Content,
    ItemsContent,
    MappingContent,
    SlotContent,
    TensorContent,
    ValueContent,
    same_bits,
)

# The walk stops here: a model that refers to its trainer or its data would drag in
# the rest of the process.
_MOST_OBJECTS = 20_000
_OPAQUE_PACKAGES = {
    *(
        "noisekit",
        "torch",
        "torchvision",
        "numpy",
        "logging",
        "threading",
        "concurrent",
    ),
    *("multiprocessing", "asyncio", "lightning", "pytorch_lightning", "accelerate"),
    *("lightning_fabric", "deepspeed", "wandb", "tensorboard", "tensorflow", "jax"),
}
_IMMUTABLE = frozenset(
    (
        *(bool, int, float, complex, str, bytes, type(None), range, slice),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
        *(types.ModuleType, types.BuiltinFunctionType),
    )
)
# What every module has; of these only the modes, tensors and hooks are state.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")


class ModelState:
    """All that a forward or a backward pass of some modules may change.

    While :meth:`set_aside` holds, each tensor stays the same object with a copy of its
    memory, and gradients and hooks of parameters are away. That takes the memory of
    one copy of all parameters and buffers. Restoring puts the tensors' own memory
    back, which nothing has written to, and the earlier contents into containers and
    objects, which stay the same ones.

    Not followed: iterators, closures of functions but for random generators, objects
    that extension modules define, and those of optimizers, trainers and loggers.

    Args:
        roots: Modules and functions, from which everything else is reached.
        uncopied: Tensors whose memory the caller replaces itself.
    """

    def __init__(self, *roots: object, uncopied: Collection[Tensor] = ()) -> None:
        self._tensors: list[TensorContent] = []
        self._contents: list[Content] = []
        self._seen: dict[int, object] = {}
        self._uncopied = {id(tensor) for tensor in uncopied}
        waiting: list[object] = list(roots)
        while waiting and len(self._seen) < _MOST_OBJECTS:
            value = waiting.pop()
            if type(value) in _IMMUTABLE or id(value) in self._seen:
                continue
            self._seen[id(value)] = value  # kept alive, so that ids stay unique
            waiting += self._record(value)

    def set_aside(self) -> None:
        """Put copies in the place of the tensors' memory."""
        for state in self._tensors:
            state.set_aside(copy=id(state.tensor) not in self._uncopied)

    def restore(self) -> None:
        """Restore everything, also where something of it fails."""
        with ExitStack() as stack:
            for tensor in self._tensors:
                stack.callback(tensor.restore)
            for content in self._contents:
                stack.callback(content.restore)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in an order that is the same for the same modules."""
        return [content.tensor for content in self._tensors]

    def reset(self, written: Iterable[int]) -> None:
        """Restore everything but tensors, and copies of the tensors at ``written``."""
        for content in self._contents:
            content.restore()
        for position in written:
            held = self._tensors[position]
            held.tensor.data = held.data.clone()

    def written(self) -> list[int]:
        """Return the positions of tensors that were written to since set aside."""
        return [
            position
            for position, content in enumerate(self._tensors)
            if not same_bits(content.tensor.data, content.data)
        ]

    def has_moved(self) -> bool:
        """Whether an attribute, a container or a generator is not as it was."""
        return any(content.has_changed() for content in self._contents)

    def _record(self, value: object) -> Iterable[object]:
        """Note how to restore ``value`` itself, and return what it refers to."""
        if isinstance(value, Tensor):
            # Results of operations are made anew by each forward pass.
            if value.grad_fn is None and not _is_uninitialised(value):
                self._tensors.append(TensorContent(value))
            return ()
        for kinds, record in _RECORDERS:
            if isinstance(value, kinds):
                return record(value, self._contents)
        if type(value).__module__.partition(".")[0] in _OPAQUE_PACKAGES:
            return ()
        return _record_object(value, self._contents)


def _record_module(module: nn.Module, contents: list[Content]) -> Iterable[object]:
    attributes = vars(module)
    contents.append(MappingContent(attributes))
    found = [v for k, v in attributes.items() if k not in _MODULE_ATTRIBUTES]
    for name in ("_parameters", "_buffers", "_modules"):
        found += _record_mapping(attributes[name], contents)
    for name in _HOOK_TABLES:
        found += attributes[name].values()
    if not type(module).__module__.startswith("torch."):
        found += _generators_named_by(type(module).forward, contents)
    return found


def _record_mapping(
    mapping: dict[Any, Any], contents: list[Content]
) -> Iterable[object]:
    contents.append(MappingContent(mapping))
    return mapping.values()


def _record_items(items: Any, contents: list[Content]) -> Iterable[object]:
    contents.append(ItemsContent(items))
    return list(items)


def _record_value(value: Any, contents: list[Content]) -> Iterable[object]:
    contents.append(ValueContent(value))
    return ()


def _record_object(value: object, contents: list[Content]) -> Iterable[object]:
    """An instance of a class of the user's: its attributes and slots."""
    found: list[object] = []
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        found += _record_mapping(attributes, contents)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            slot = vars(kind).get(name)
            with suppress(AttributeError):  # a slot without a value
                content = slot.__get__(value)  # type: ignore[union-attr]
                contents.append(SlotContent(value, name, content))
                found.append(content)
    return found


def _generators_named_by(function: Any, contents: list[Content]) -> Iterable[object]:
    """Random generators that a function's code names, in its closure or its module."""
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType):
        return ()
    names = function.__globals__
    found = [names[n] for n in function.__code__.co_names if n in names]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that has no value yet
            found.append(cell.cell_contents)
    return [value for value in found if isinstance(value, GENERATORS)]


_RECORDERS: tuple[tuple[Any, Callable[[Any, list[Content]], Iterable[object]]], ...] = (
    (type, lambda value, _: ()),
    (nn.Module, _record_module),
    (dict, _record_mapping),
    ((list, deque, set), _record_items),
    ((tuple, frozenset), lambda value, _: value),
    (GENERATORS, _record_value),
    (np.ndarray, _record_value),
    (types.FunctionType, _generators_named_by),
    (types.MethodType, lambda value, _: (value.__self__, value.__func__)),
    (partial, lambda value, _: (value.func, value.args, value.keywords)),
)


@contextmanager
def preserve_model_state(
    *modules: nn.Module, uncopied: Collection[Tensor] = ()
) -> Iterator[ModelState]:
    """Restore all of the modules' state and the random state on exit, bit for bit.

    Args:
        *modules: Whose parameters, buffers, modes, gradients and attributes.
        uncopied: Parameters whose memory the caller replaces itself.

    Yields:
        The state.
    """
    state = ModelState(*modules, uncopied=uncopied)
    with preserve_rng_state():
        try:
            state.set_aside()
            yield state
        finally:
            state.restore()


def _is_uninitialised(tensor: Tensor) -> bool:
    return isinstance(tensor, UninitializedBuffer | UninitializedParameter)
