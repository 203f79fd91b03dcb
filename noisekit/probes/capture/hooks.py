"""Hook objects that never outlive their probe and never follow a copied model.

Also what keeps probes from recording what a measurement does with their model, and
what keeps a probe's own faults out of somebody's training.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from noisekit.core.errors import NoisekitError, ProbeWarning


class InertHook:
    """What a hook becomes in a copied or unpickled model: it does nothing."""

    __slots__ = ()

    def __call__(self, *args: object) -> None:
        """Do nothing."""


class ModelHook:
    """A module hook that calls a method of its recorder, for one module only.

    Copies of the model, such as an exponential moving average, get an inert hook:
    they neither feed the original's readings nor carry its optimizer along.
    """

    __slots__ = ("__weakref__", "_method", "_module", "_tag")

    def __init__(
        self, method: Callable[..., object], module: nn.Module, tag: object = None
    ) -> None:
        self._method = weakref.WeakMethod(method)
        self._module = weakref.ref(module)
        self._tag = tag

    def __call__(self, module: nn.Module, *args: Any) -> object:  # what PyTorch passes
        """Pass the call on, unless the recorder is gone or this is a copy.

        While a model is compiled that was not when the hook was made, nothing is
        traced: the compiled code has no hooks, and readings say so.
        """
        if torch.compiler.is_compiling():
            return None
        method = self._method()
        if method is not None and module is self._module():
            return method(self._tag, *args)
        return None

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        """Be copied and pickled as an inert hook."""
        return InertHook, ()


class ParameterHook:
    """A parameter's hook that calls a method of its recorder."""

    __slots__ = ("_index", "_method")

    def __init__(self, method: Callable[[int], None], index: int) -> None:
        self._method = weakref.WeakMethod(method)
        self._index = index

    def __call__(self, parameter: Tensor) -> None:
        """Pass the call on, unless the recorder is gone or the backward is compiled."""
        if torch.compiler.is_compiling():
            return
        method = self._method()
        if method is not None:
            method(self._index)


class _Suspension:
    """Who may record now; one for the process, since backward passes change threads."""

    def __init__(self) -> None:
        self.imposed = False
        self.exempt: object | None = None


_SUSPENSION = _Suspension()


@contextmanager
def suspend_recording(exempt: object | None = None) -> Iterator[None]:
    """Let only ``exempt`` record, or nobody."""
    before = (_SUSPENSION.imposed, _SUSPENSION.exempt)
    _SUSPENSION.imposed, _SUSPENSION.exempt = True, exempt
    try:
        yield
    finally:
        _SUSPENSION.imposed, _SUSPENSION.exempt = before


def is_suspended(recorder: object) -> bool:
    """Whether ``recorder`` must not record now, or is being traced by a compiler."""
    if torch.compiler.is_compiling():
        return True
    return _SUSPENSION.imposed and _SUSPENSION.exempt is not recorder


OnError = Literal["warn", "raise"]
"""What becomes of a fault of the probe: a step without a reading, or an error."""


class Faults:
    """What has gone wrong in a probe's hooks, where that must not stop a training.

    Attributes:
        on_error: Whether faults are raised, or end the reading with one warning.
        reason: Why the present step cannot be read; empty while nothing is wrong.
        has_warned: Whether a fault was warned of.
    """

    def __init__(self, on_error: OnError = "raise") -> None:
        self.on_error = on_error
        self.reason = ""
        self.has_warned = False

    def note(self, error: Exception) -> None:
        """Raise ``error``, or end the step's reading because of it."""
        self.report(error)
        self.reason = self.reason or _reason(error)

    def report(self, error: Exception) -> None:
        """Raise ``error``, or warn of it, the first time only."""
        if self.on_error == "raise":
            raise error
        if self.has_warned:
            return
        self.has_warned = True
        warnings.warn(
            f"a probe could not read a step, and training goes on. {_reason(error)} "
            "Later faults are in the readings' coverage alone; attach with "
            "on_error='raise' to see where this one comes from.",
            ProbeWarning,
            stacklevel=3,
        )


def _reason(error: Exception) -> str:
    """What a reader of the coverage is told of an error."""
    if isinstance(error, NoisekitError):
        return str(error)
    said = str(error).partition("\n")[0].rstrip(".")
    return f"The probe failed with {type(error).__name__}: {said}."


class HasFaults(Protocol):
    """Whoever has methods that hooks call."""

    faults: Faults


_Owner = TypeVar("_Owner", bound=HasFaults)
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def guarded(
    method: Callable[Concatenate[_Owner, _Args], _Result],
) -> Callable[Concatenate[_Owner, _Args], _Result | None]:
    """Keep what goes wrong in a hook's method from the training that calls it."""

    def call(
        self: _Owner, /, *args: _Args.args, **kwargs: _Args.kwargs
    ) -> _Result | None:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.faults.note(error)
            return None

    functools.update_wrapper(call, method)
    return call
