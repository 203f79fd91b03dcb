"""What a module's call depends on and may change, beside its inputs and parameters."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class CallState:
    """What a call of a module may change, as it was before.

    Attributes:
        random: State of the generator that the call draws from.
        buffers: The module's buffers themselves.
        versions: How often each of them had been written to.
        copies: Copies of them by name, where calls are known to write to them.
    """

    random: Tensor
    buffers: tuple[Tensor, ...]
    versions: tuple[int, ...]
    copies: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, *, copying: bool) -> "CallState":
        """Return the state of ``module`` now."""
        named = dict(module.named_buffers())
        return cls(
            random_state(module),
            tuple(named.values()),
            tuple(buffer._version for buffer in named.values()),
            {n: b.clone() for n, b in named.items()} if copying else {},
        )

    def has_drawn(self, module: nn.Module) -> bool:
        """Whether random numbers have been drawn since."""
        return not torch.equal(self.random, random_state(module))

    def has_written(self, module: nn.Module) -> bool:
        """Whether buffers have been written to or replaced since."""
        now = tuple(module.buffers())
        same = len(now) == len(self.buffers) and all(map(is_, now, self.buffers))
        return not same or self.versions != tuple(b._version for b in now)


@contextmanager
def attributes_given_back(module: nn.Module) -> Iterator[None]:
    """Restore what a forward pass keeps on its modules beside buffers.

    Such as weights that a hook computes, activations kept for a penalty, counters.
    """
    kept = [
        (attributes, dict(attributes), _contents(attributes))
        for attributes in (vars(child) for child in module.modules())
    ]
    try:
        yield
    finally:
        for attributes, values, contents in kept:
            for name in set(attributes) - set(values):
                del attributes[name]
            for name, value in values.items():
                attributes[name] = value
            for container, entries in contents:
                container.clear()
                if isinstance(container, list):
                    container.extend(entries)
                else:
                    container.update(entries)


_Container = list[Any] | dict[Any, Any]
_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module: what they hold is put back by whoever replaces it."""


def _contents(attributes: dict[str, Any]) -> list[tuple[_Container, _Container]]:
    """Lists and mappings among the attributes, each with a copy of what it holds."""
    return [
        (value, value.copy())
        for name, value in attributes.items()
        if isinstance(value, list | dict) and name not in _OWN
    ]


def autocast_dtype(module: nn.Module) -> torch.dtype | None:
    """Return what operations on the device of ``module`` are cast to, if they are."""
    kind = _device_of(module.parameters()).type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_as(
    dtype: torch.dtype | None, tensors: Iterable[Tensor]
) -> AbstractContextManager[object]:
    """Cast operations to ``dtype`` again, weights anew: they may be other ones."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(_device_of(tensors).type, dtype=dtype, cache_enabled=False)


def random_state(module: nn.Module) -> Tensor:
    """Return the state of the generator that a call of ``module`` draws from."""
    device = _device_of(module.parameters())
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def restore_random_state(state: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set the generator of the device that ``tensors`` are on."""
    device = _device_of(tensors)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _device_of(tensors: Iterable[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
