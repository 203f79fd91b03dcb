"""Squared norms of per-example gradients from a layer's input and output gradient.

A rule knows one kind of layer. From the captured call it gives the squared norms
without forming per-example gradients where that is cheaper, and the per-example
gradients themselves for a slice of examples, which is what shared weights and the
closure check need. Both are exact.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core import reductions
from noisekit.core.layers.batch_axis import examples_first

CHUNK_ELEMENTS = 2**21
"""Elements of per-example gradients held at a time: 8 MB in float32."""


@dataclass(slots=True)
class LayerCall:
    """One call of a module inside a training step, captured by hooks.

    Attributes:
        module: What was called.
        args: Positional inputs, detached.
        kwargs: Keyword inputs, detached.
        axes: Axis of the examples per tensor among the inputs, in order.
        num_examples: Rows of the batch.
        grads: Gradient of the loss per tensor among the outputs, as they arrive.
        rng_state: Random state before the call, where the call drew from it.
        output_axes: Axis of the examples per gradient that has arrived.
        output_order: Axis of the examples per tensor among the outputs, where it has
            been established; ``MIXED`` where there is none.
        statistics: What a normalisation layer's backward pass keeps of its input.
        before: A copy of the module as it was before the call, for a replay; ``None``
            where the call has left the module as it was.
        autocast: The lower precision that operations were cast to, if any.
    """

    module: nn.Module
    args: tuple[Any, ...]  # whatever the module takes
    kwargs: dict[str, Any]
    axes: tuple[int | None, ...]
    num_examples: int
    grads: list[Tensor | None] = field(default_factory=list)
    rng_state: Tensor | None = None
    output_axes: tuple[int | None, ...] = ()
    output_order: tuple[int | None, ...] = ()
    statistics: tuple[Tensor, ...] = ()
    before: nn.Module | None = None
    autocast: torch.dtype | None = None

    @property
    def original(self) -> nn.Module:
        """The module as it was before the call."""
        return self.module if self.before is None else self.before

    @property
    def input(self) -> Tensor:
        """The only tensor input of a layer, examples first."""
        tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        axis = self.axes[0]
        assert isinstance(tensor, Tensor)
        assert axis is not None
        return examples_first(tensor, axis)

    @property
    def output_grad(self) -> Tensor:
        """The gradient of a layer's only output, examples first."""
        grad, axis = self.grads[0], self.axes[0]
        assert grad is not None
        assert axis is not None
        return examples_first(grad, axis)


def widen(tensor: Tensor) -> Tensor:
    """Return half-precision tensors in float32; their squares overflow."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor


def row_sq_norms(tensor: Tensor) -> Tensor:
    """Return the squared norm of every row of ``tensor`` (rows on axis 0)."""
    return reductions.row_sq_norms(widen(tensor).reshape(len(tensor), -1))


def row_slices(num_examples: int, elements: int) -> Iterator[slice]:
    """Yield slices of the examples so that ``elements`` each fit into the memory."""
    return sub_slices(slice(0, num_examples), elements)


def sub_slices(rows: slice, elements: int) -> Iterator[slice]:
    """Yield parts of ``rows`` so that ``elements`` per example fit into the memory."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def over_rows(
    function: Callable[[slice], Tensor], num_examples: int, elements: int
) -> Tensor:
    """Concatenate ``function`` over slices of examples."""
    parts = [function(rows) for rows in row_slices(num_examples, elements)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def added_up(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of the tensors, of which only one is kept at a time."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


class LayerRule(ABC):
    """How to read one kind of layer."""

    name: ClassVar[str]

    @abstractmethod
    def applies(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind and computes what it should."""

    @abstractmethod
    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Axes that may run over the examples, of the tensor input at ``position``."""

    @abstractmethod
    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Per-example gradients of the parameters ``names`` for ``rows``."""

    def statistics(self, output: Tensor) -> tuple[Tensor, ...]:
        """What the layer's own graph keeps that spares a pass over the input."""
        return ()

    def working_size(self, call: LayerCall, names: Collection[str]) -> int:
        """Elements per example that reading ``names`` holds at a time."""
        return sum(call.module.get_parameter(name).numel() for name in names)

    def splits(self, call: LayerCall) -> bool:
        """Whether a gradient costs little more as the sum of its examples' own ones."""
        return False

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """Squared norm per example of the parameters ``names``; the general form."""
        parts = [
            {name: row_sq_norms(grads) for name, grads in found.items()}
            for rows in row_slices(call.num_examples, self.working_size(call, names))
            for found in (self.example_grads(call, names, rows),)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def summed_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Gradients of the parameters ``names``, summed over ``rows``."""
        return self._reduced(call, names, rows, lambda grads: grads.sum(0))

    def square_sums(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """Element-wise squares of the per-example gradients, summed over examples."""
        rows = slice(0, call.num_examples)
        return self._reduced(call, names, rows, lambda g: widen(g).square().sum(0))

    def _reduced(
        self,
        call: LayerCall,
        names: Collection[str],
        rows: slice,
        reduce: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Sums over a few examples at a time, added up."""
        totals: dict[str, Tensor] = {}
        for part in sub_slices(rows, self.working_size(call, names)):
            for name, grads in self.example_grads(call, names, part).items():
                found = reduce(grads)
                totals[name] = totals[name].add_(found) if name in totals else found
        return totals

    def inner_products(self, call: LayerCall, tangents: dict[str, Tensor]) -> Tensor:
        """Inner product per example of its gradient with ``tangents``.

        The layers that have rules are linear in their parameters, so that it is the
        output gradient times the layer's output with the tangents as parameters.
        """
        weights = {
            name: widen(tangents.get(name, torch.zeros_like(parameter)))
            for name, parameter in call.module.named_parameters(recurse=False)
        }
        args, kwargs = pytree.tree_map_only(Tensor, widen, (call.args, call.kwargs))
        output = torch.func.functional_call(call.module, weights, args, kwargs)
        axis = call.axes[0]
        assert axis is not None
        products = widen(examples_first(output, axis)) * widen(call.output_grad)
        return products.flatten(1).sum(1)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` runs ``kind``'s own forward on its own parameters.

    Parametrised, weight-normed and monkeypatched layers do not.
    """
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in vars(module)
        and set(module._parameters) <= {"weight", "bias"}
        and "weight" in module._parameters
    )
