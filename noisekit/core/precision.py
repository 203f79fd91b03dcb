"""A model computed in a wider floating type for a while, its own tensors set aside."""

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from noisekit.core.batches import map_tensors


def is_narrower(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``tensor`` has floating-point numbers of fewer bits than ``dtype``."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return tensor.dtype.to_real().itemsize < dtype.itemsize


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """Return the real floating type of the model's that has the fewest digits."""
    dtypes = {
        tensor.dtype.to_real()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() or tensor.is_complex()
    }
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``, or in the complex type of its width."""
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


class Precision:
    """The least type in which a model and its loss are computed.

    While they are held, copies in that type replace their narrower
    parameters and buffers. Their own tensors are set aside, not converted, so that
    they come back bit for bit, and so that nothing which other code attached to
    them, such as the gradient accumulators of a live graph, narrows what is computed.

    Attributes:
        dtype: That type; ``None`` computes in whatever type the model has.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._copies: dict[int, nn.Parameter] = {}

    def leaves_of(self, parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
        """Return the copies that replace parameters now, or the parameters."""
        return tuple(self._copies.get(id(p), p) for p in parameters)

    def narrow_tensors(self, *evaluated: object) -> list[Tensor]:
        """Return the narrower tensors of modules, which copies will replace."""
        if self.dtype is None:
            return []
        modules = [item for item in evaluated if isinstance(item, nn.Module)]
        return [t for m in modules for _, _, t in _narrow_slots(m, self.dtype)]

    def convert(self, value: Any) -> Any:  # any nesting a loader yields
        """Return ``value`` with each narrower floating tensor inside converted."""
        dtype = self.dtype
        if dtype is None:
            return value
        return map_tensors(
            lambda t: widened(t, dtype) if is_narrower(t, dtype) else t, value
        )

    @contextmanager
    def held(self, *evaluated: object) -> Iterator[None]:
        """Hold the modules among ``evaluated`` in this precision; may be nested.

        Shared parameters stay shared.
        """
        if self.dtype is None or self._copies:
            yield
            return
        modules = [item for item in evaluated if isinstance(item, nn.Module)]
        slots = [slot for m in modules for slot in _narrow_slots(m, self.dtype)]
        try:
            for holder, name, tensor in slots:
                holder[name] = self._copy_of(tensor)
            yield
        finally:
            for holder, name, tensor in slots:
                holder[name] = tensor
            self._copies.clear()

    def _copy_of(self, tensor: Tensor) -> Tensor:
        assert self.dtype is not None
        if not isinstance(tensor, nn.Parameter):
            return widened(tensor.detach(), self.dtype)
        copy = self._copies.get(id(tensor))
        if copy is None:
            wide = widened(tensor.detach(), self.dtype)
            copy = nn.Parameter(wide, requires_grad=tensor.requires_grad)
            self._copies[id(tensor)] = copy
        return copy


_Slot = tuple[MutableMapping[str, Any], str, Tensor]


def _narrow_slots(root: nn.Module, dtype: torch.dtype) -> list[_Slot]:
    """Every place of a narrower tensor: the dictionary, the name in it, the tensor."""
    return [
        (holder, name, tensor)
        for module in root.modules()
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        if tensor is not None and is_narrower(tensor, dtype)
    ]
