"""Deep copies of modules that share no state with the original, hooks included.

``copy.deepcopy`` refuses tensors with a graph, shares the closures of functions, and
takes along what ``torch.compile`` made of the original. A copy made here can run a
forward pass without the original taking notice.
"""

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from noisekit.core.errors import ModelCopyError

_Memo = dict[int, Any]
"""Copies by ``id`` of the original, as for ``copy.deepcopy``."""

_SHARED = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.Size),
    *weakref.ProxyTypes,  # such as a trainer, which is no part of its model
)


def copy_module(
    module: nn.Module, replaced: Mapping[Tensor, Tensor] | None = None
) -> nn.Module:
    """Return a copy of ``module`` and of all that its attributes hold.

    Parameters, buffers, plain tensors, containers, generators and helper objects are
    copied once each, however many names they have. Compiled parts are copied as they
    were written.

    Args:
        module: The original, which is only read.
        replaced: Tensors that take the place of others wherever these are referenced,
            such as new leaves for parameters.

    Raises:
        ModelCopyError: If an attribute cannot be copied.
    """
    memo: _Memo = {id(old): new for old, new in (replaced or {}).items()}
    copied: nn.Module = copy_value(module, memo)
    return copied


def copied_parameters(
    module: nn.Module, copied: nn.Module, parameters: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    """Return what became of ``parameters`` of ``module`` in its copy."""
    pairs = zip(module.parameters(), copied.parameters(), strict=True)
    copies = {id(original): made for original, made in pairs}
    return [copies[id(parameter)] for parameter in parameters]


def copy_value(value: Any, memo: _Memo | None = None) -> Any:
    """Return a copy of a value in the same way, such as of a model's inputs.

    Raises:
        ModelCopyError: If something in it cannot be copied.
    """
    try:
        return _copied(value, {} if memo is None else memo)
    except Exception as error:  # whatever an object of the user's says
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelCopyError(
            f"needs what can be copied, got {type(value).__name__} ({reason})"
        ) from error


@contextmanager
def uncached_parametrizations() -> Iterator[None]:
    """Compute parametrised weights anew, also inside ``parametrize.cached()``.

    That cache goes by ``id`` of the module, which another copy may have had before.
    """
    enabled = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


def _copied(value: Any, memo: _Memo) -> Any:
    """Copy one value, keeping identities: what was one object stays one."""
    if type(value) in _SHARED or isinstance(value, type):
        return value
    if id(value) in memo:
        return memo[id(value)]
    made = _make(value, memo)
    memo[id(value)] = made
    # An id is only unique as long as its object lives.
    memo.setdefault(id(memo), []).append(value)
    return made


def _make(value: Any, memo: _Memo) -> Any:
    if isinstance(value, nn.Module):
        return _copied_module(value, memo)
    if isinstance(value, Tensor):
        return _copied_tensor(value)
    make = _MAKERS.get(type(value))
    if make is not None:
        return make(value, memo)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(entry, memo) for entry in value))
    return copy.deepcopy(value, memo)


def _copied_collection(value: Any, memo: _Memo) -> Any:
    return type(value)(_copied(entry, memo) for entry in value)


def _copied_mapping(value: Any, memo: _Memo) -> Any:
    return type(value)((key, _copied(entry, memo)) for key, entry in value.items())


def _copied_deque(value: Any, memo: _Memo) -> Any:
    return deque((_copied(entry, memo) for entry in value), value.maxlen)


def _copied_method(value: types.MethodType, memo: _Memo) -> types.MethodType:
    return types.MethodType(value.__func__, _copied(value.__self__, memo))


def _copied_partial(value: Any, memo: _Memo) -> Any:
    function, args, kwargs = _copied((value.func, value.args, value.keywords), memo)
    return functools.partial(function, *args, **kwargs)


def _copied_module(module: nn.Module, memo: _Memo) -> nn.Module:
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module):  # what torch.compile has wrapped
        return _copied(original, memo)  # type: ignore[no-any-return]
    if _copies_itself(type(module)):
        return copy.deepcopy(module, memo)
    made = module.__new__(type(module))
    memo[id(module)] = made  # modules may refer to each other
    for name, value in vars(module).items():
        if name != "_compiled_call_impl":
            vars(made)[name] = _copied(value, memo)
    return made


def _copies_itself(kind: type[nn.Module]) -> bool:
    """Whether a class of modules has its own idea of what a copy is."""
    return (
        hasattr(kind, "__deepcopy__")
        or kind.__reduce_ex__ is not nn.Module.__reduce_ex__
        or kind.__getstate__ is not nn.Module.__getstate__
    )


def _copied_tensor(tensor: Tensor) -> Tensor:
    """A leaf of the same values, without gradient, graph and hooks."""
    made = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.is_leaf and tensor.requires_grad)


def _copied_function(function: types.FunctionType, memo: _Memo) -> types.FunctionType:
    """A function whose closure holds copies: what it counts, it counts for itself."""
    if not function.__closure__:
        return function
    cells = tuple(types.CellType() for _ in function.__closure__)
    made = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        cells,
    )
    memo[id(function)] = made  # a closure may refer to its own function
    made.__kwdefaults__ = function.__kwdefaults__
    for cell, original in zip(cells, function.__closure__, strict=True):
        try:
            content = original.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
        cell.cell_contents = _copied(content, memo)
    return made


_MAKERS: Mapping[type, Callable[[Any, _Memo], Any]] = {
    **dict.fromkeys((list, set, tuple), _copied_collection),
    **dict.fromkeys((dict, OrderedDict), _copied_mapping),
    deque: _copied_deque,
    types.FunctionType: _copied_function,
    types.MethodType: _copied_method,
    functools.partial: _copied_partial,
}
