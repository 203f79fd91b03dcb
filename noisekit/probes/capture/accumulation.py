"""Whether a backward pass adds to what earlier ones of the same step have left."""

import math
from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor, nn

from noisekit.core.layers.rule import widen
from noisekit.core.reductions import sq_norms

_Mark = tuple[tuple[int, int] | None, ...]


class Before(Enum):
    """What a backward pass finds in ``.grad``."""

    EMPTY = auto()
    """Nothing, or zeros: a new step starts."""
    ACCUMULATING = auto()
    """What an earlier backward pass of the same step has left."""
    NOT_ZEROED = auto()
    """What the step before has left: it is applied a second time."""
    CHANGED = auto()
    """Something else: scaled or clipped between two backward passes."""


class GradientWatch:
    """Follows ``.grad`` through zeroing, accumulation and steps, without reading it.

    Identity and write count tell who wrote last. Only where they cannot, after a step
    that was skipped or broke off, are the values asked, which synchronises.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._mark: _Mark | None = None
        self._stepped = self._writes_data = False

    def before(self) -> Before:
        """Return what is in ``.grad`` now, at the start of a backward pass."""
        now = self._now()
        if all(entry is None for entry in now):
            return Before.EMPTY
        if now == self._mark:
            if not self._stepped:
                return Before.ACCUMULATING
            # ``grad.data.zero_()`` leaves no trace but the values.
            return Before.EMPTY if self._all_zero() else Before.NOT_ZEROED
        if self._stepped and self._mark is not None:
            return Before.EMPTY  # written to after the step: zeroed in place
        return Before.EMPTY if self._all_zero() else Before.CHANGED

    def changed(self) -> bool:
        """Whether ``.grad`` was written to since a backward pass or step has left it.

        Unscaling a scaler's gradients does not count as such; clipping them does, also
        where nothing had to be clipped.
        """
        return self._now() != self._mark

    def factor(self, before: Tensor, *, look: bool) -> Tensor | float:
        """Return what ``|.grad|`` was multiplied by since a backward pass has left it.

        Args:
            before: Its squared norm then, by parameter.
            look: Whether to compare values although no write was counted: writes to
                ``grad.data`` never are. Once there was one, values are compared always.
        """
        counted, look = self.changed(), look and not before.is_meta  # no values there
        if not (counted or look or self._writes_data):
            return 1.0
        with torch.no_grad():
            after = gradient_sq_norms(self._parameters)
            if not counted and not self._writes_data:
                self._writes_data = not torch.equal(after, before.to(after))
            if not counted and not self._writes_data:
                return 1.0
            return (after.sum() / before.sum()).sqrt()

    def after_backward(self) -> None:
        """Remember what a backward pass has left."""
        self._mark, self._stepped = self._now(), False

    def after_step(self) -> None:
        """Remember what an optimizer step has left."""
        self._mark, self._stepped = self._now(), True

    def _now(self) -> _Mark:
        grads = [parameter.grad for parameter in self._parameters]
        return tuple(None if g is None else (id(g), g._version) for g in grads)

    def _all_zero(self) -> bool:
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if any(grad.is_meta for grad in grads):
            return True
        largest = torch.stack([_largest(grad) for grad in grads])
        return not bool(largest.any())


def _largest(grad: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(grad.detach().float(), ord=math.inf)
    return largest


def gradient_sq_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return ``|.grad|²`` per parameter, zero where there is none.

    In float32 or wider: squares of half-precision gradients overflow.
    """
    found = [(i, p.grad) for i, p in enumerate(parameters) if p.grad is not None]
    if not found:
        return parameters[0].new_zeros(len(parameters))
    norms = sq_norms([widen(grad) for _, grad in found])
    if len(found) == len(parameters):
        return norms
    index = torch.tensor([i for i, _ in found], device=norms.device)
    return norms.new_zeros(len(parameters)).index_copy_(0, index, norms)
