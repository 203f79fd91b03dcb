"""A cheap signature of what makes a model another one to a probe."""

from collections.abc import Sequence
from typing import Any

from torch import nn

Signature = tuple[Any, ...]  # compared, never looked into

_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


class Structure:
    """Notices hooks, parametrisations, patched forwards, pruning and frozen weights.

    A gradient-sum check would notice most of them too, but only when it is next due.
    One pass over the modules' own dictionaries, a microsecond each, tells at once.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._model = model
        self._parameters = parameters
        self._modules = list(model.modules())
        self._last = self._signature()

    def has_changed(self) -> bool:
        """Whether the model is another one than at the last call."""
        now = self._signature()
        if now == self._last:
            return False
        self._modules = list(self._model.modules())
        self._last = self._signature()
        return True

    def refresh(self) -> None:
        """Take the model as it is, after the probe has moved hooks of its own."""
        self._last = self._signature()

    def _signature(self) -> Signature:
        modules = tuple(
            (
                type(module),  # which a parametrisation exchanges
                vars(module).get("forward"),
                tuple(module._parameters),
                *(tuple(vars(module)[name]) for name in _DICTS),
            )
            for module in self._modules
        )
        parameters = tuple(
            (p.requires_grad, tuple(p._backward_hooks or ())) for p in self._parameters
        )
        return modules, parameters
