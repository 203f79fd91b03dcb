"""Per-example gradients of any module: its own call replayed, one example at a time.

The vector-Jacobian product of the module, from its captured inputs and output
gradients, needs neither the loss nor the targets. It costs a forward and a backward
pass of the module per example, vectorised where PyTorch can.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.errors import LayerReadError
from noisekit.core.layers.batch_axis import MIXED, example_rows
from noisekit.core.layers.call_state import (
    CallState,
    autocast_as,
    restore_random_state,
)
from noisekit.core.layers.rule import (
    LayerCall,
    LayerRule,
    row_slices,
    widen,
)
from noisekit.core.model_copies import copy_module, uncached_parametrizations
from noisekit.core.randomness import preserve_rng_state


class ModuleReplay(LayerRule):
    """The rule for every module without one of its own; one instance per module."""

    name = "replay"

    def __init__(self) -> None:
        self._vectorises = True

    def note_state(self, call: LayerCall, before: CallState) -> None:
        """Give ``call`` the state from which it can be replayed."""
        call.before = before.module
        if before.has_drawn(call.module):
            call.rng_state = before.random

    def applies(self, module: nn.Module) -> bool:
        """Every module can be replayed."""
        return True

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Any axis, or the one that recurrent and attention modules document."""
        if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and len(shape) == 3:
            # An RNN's states have the examples on axis 1 whatever batch_first.
            states = isinstance(module, nn.RNNBase) and position > 0
            axis = 0 if module.batch_first and not states else 1
            return range(axis, axis + 1)
        if isinstance(module, nn.RNNBase):
            return range(0)  # packed: sequences of all examples in one
        if isinstance(module, nn.EmbeddingBag):
            return range(int(len(shape) == 2))  # bags by offsets: the same
        return range(len(shape))

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Vectorised where possible, else a loop; random calls with their own draws."""
        replay = _Replay.of(call, tuple(names))
        with _replayable(call):
            if call.rng_state is not None or call.num_examples == 1:
                return replay.by_masked_gradients(rows)
            if self._vectorises:
                try:
                    return replay.vectorised(rows)
                except Exception:
                    # vmap does not know every operation, and says so in many types
                    # of error; a fault of the module shows up in the loop again.
                    self._vectorises = False
            return replay.by_examples(rows)

    def summed_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """One vector-Jacobian product for all of ``rows``."""
        with _replayable(call):
            return _Replay.of(call, tuple(names)).summed(rows)

    def output_axes(self, call: LayerCall) -> tuple[int, ...]:
        """Return the axis of the examples of each output gradient that arrived."""
        return _Replay.of(call, ()).output_axes()

    def inner_products(self, call: LayerCall, tangents: dict[str, Tensor]) -> Tensor:
        """From the per-example gradients themselves."""
        elements = sum(tangent.numel() for tangent in tangents.values())
        parts = []
        for rows in row_slices(call.num_examples, elements):
            grads = self.example_grads(call, tuple(tangents), rows)
            products = [
                (widen(grads[name]) * tangent).reshape(len(grads[name]), -1).sum(1)
                for name, tangent in tangents.items()
            ]
            parts.append(torch.stack(products).sum(0))
        return torch.cat(parts)


@contextmanager
def _replayable(call: LayerCall) -> Iterator[None]:
    """Say of an error that it is the replay's, which a larger module may not have."""
    try:
        yield
    except LayerReadError:
        raise
    except Exception as error:
        kind, reason = type(call.module).__name__, str(error).partition("\n")[0]
        raise LayerReadError(f"replaying {kind} on one example: {reason}") from error


@dataclass(slots=True)
class _Replay:
    """One captured call, ready to be run again.

    Attributes:
        call: The captured call.
        params: The parameters asked for, as new leaves.
        originals: The same parameters in the copy of the module.
        leaves: Every input, tensor or not.
        structure: How ``leaves`` make up positional and keyword inputs.
        positions: Which leaves are tensors.
    """

    call: LayerCall
    params: dict[str, Tensor]
    originals: dict[str, Tensor]
    leaves: list[Any]  # whatever the module takes
    structure: pytree.TreeSpec
    positions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, call: LayerCall, names: Sequence[str]) -> "_Replay":
        originals: dict[str, Tensor] = {
            # What torch.compile has wrapped is copied as it was written.
            name: call.original.get_parameter(name.replace("_orig_mod.", ""))
            for name in names
        }
        params = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in originals.items()
        }
        leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return cls(call, params, originals, leaves, structure, positions)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the inputs."""
        return [self.leaves[i] for i in self.positions]

    def run(self, params: dict[str, Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs whose gradient arrived, for other inputs."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        # A copy for every run: a replay may write to whatever its module holds.
        replaced = {self.originals[name]: leaf for name, leaf in params.items()}
        module = copy_module(self.call.original, replaced)
        with uncached_parametrizations(), autocast_as(self.call.autocast, tensors):
            outputs = module(*args, **kwargs)
        found = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
        return [
            output
            for output, grad in zip(found, self.call.grads, strict=True)
            if grad is not None
        ]

    def output_grads(self) -> list[Tensor]:
        """The gradients that arrived."""
        return [grad for grad in self.call.grads if grad is not None]

    def output_axes(self) -> tuple[int, ...]:
        """Axis of the examples per gradient: the one that a single example shrinks."""
        if not self.call.output_axes:
            self.call.output_axes = self._established_axes() or self._shrunk_axes()
        return tuple(axis for axis in self.call.output_axes if axis is not None)

    def _established_axes(self) -> tuple[int | None, ...]:
        """What is known of the outputs whose gradients are there; empty if not all."""
        order, grads = self.call.output_order, self.call.grads
        axes = tuple(a for a, g in zip(order, grads, strict=False) if g is not None)
        if MIXED in axes:
            raise LayerReadError("its outputs are not the batch's examples in order")
        known = len(order) == len(grads) and None not in axes
        return axes if known else ()

    def _shrunk_axes(self) -> tuple[int, ...]:
        with torch.no_grad():
            single = self.run(self.params, self.rows_of_inputs(slice(0, 1)))
        return tuple(
            self._shrunk_axis(one.shape, grad.shape)
            for one, grad in zip(single, self.output_grads(), strict=True)
        )

    def _shrunk_axis(self, one: torch.Size, all_: torch.Size) -> int:
        changed = [i for i, (a, b) in enumerate(zip(one, all_, strict=True)) if a != b]
        count = self.call.num_examples
        if len(changed) != 1 or all_[changed[0]] != count or one[changed[0]] != 1:
            raise LayerReadError(
                f"needs an output with one axis of {count} examples, got shape "
                f"{tuple(all_)} for all and {tuple(one)} for one example"
            )
        return changed[0]

    def rows_of_inputs(self, rows: slice) -> list[Tensor]:
        """The inputs of some examples; inputs that all examples share as they are."""
        return [
            tensor if axis is None else example_rows(tensor, axis, rows)
            for tensor, axis in zip(self.tensors, self.call.axes, strict=True)
        ]

    def vectorised(self, rows: slice) -> dict[str, Tensor]:
        """All examples at once, by vmap."""
        axes, out_axes = self.call.axes, self.output_axes()
        params = {name: p.detach() for name, p in self.params.items()}

        def one(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> Any:  # a dict
            inputs = [
                tensor if axis is None else tensor.unsqueeze(axis)
                for tensor, axis in zip(tensors, axes, strict=True)
            ]
            pull_back = torch.func.vjp(lambda p: self.run(p, inputs), params)[1]
            return pull_back(
                [g.unsqueeze(a) for g, a in zip(grads, out_axes, strict=True)]
            )[0]

        grads = [
            example_rows(grad, axis, rows)
            for grad, axis in zip(self.output_grads(), out_axes, strict=True)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "performance drop"
            found: dict[str, Tensor] = torch.vmap(
                one, in_dims=(list(axes), list(out_axes)), randomness="error"
            )(self.rows_of_inputs(rows), grads)
        return found

    def by_examples(self, rows: slice) -> dict[str, Tensor]:
        """One example after another."""
        out_axes = self.output_axes()
        found = []
        for i in range(rows.start, rows.stop):
            row = slice(i, i + 1)
            with torch.enable_grad():
                outputs = self.run(self.params, self.rows_of_inputs(row))
            grads = [
                example_rows(grad, axis, row)
                for grad, axis in zip(self.output_grads(), out_axes, strict=True)
            ]
            found.append(self._gradients(outputs, grads, retain_graph=False))
        return self._stacked(found)

    def summed(self, rows: slice) -> dict[str, Tensor]:
        """The sum over some examples: one backward pass through their replay."""
        grads = self.output_grads()
        if self.call.num_examples == 1:
            outputs = self._same_draws()
        elif self.call.rng_state is not None:
            axes = self._axes_by_size()
            outputs = self._same_draws()
            grads = [_only(g, axis, rows) for g, axis in zip(grads, axes, strict=True)]
        else:
            axes = self.output_axes()
            with torch.enable_grad():
                outputs = self.run(self.params, self.rows_of_inputs(rows))
            grads = [
                example_rows(grad, axis, rows)
                for grad, axis in zip(grads, axes, strict=True)
            ]
        found = self._gradients(outputs, grads, retain_graph=False)
        return dict(zip(self.params, found, strict=True))

    def by_masked_gradients(self, rows: slice) -> dict[str, Tensor]:
        """The whole batch again with the same draws, one example's gradient at a time.

        Dropout masks are drawn for the batch, so that no replay of single examples
        can repeat them.
        """
        outputs = self._same_draws()
        if self.call.num_examples == 1:
            return self._stacked(
                [self._gradients(outputs, self.output_grads(), retain_graph=False)]
            )
        axes = self._axes_by_size()
        found = []
        for i in range(rows.start, rows.stop):
            masked = [
                _only(grad, axis, slice(i, i + 1))
                for grad, axis in zip(self.output_grads(), axes, strict=True)
            ]
            found.append(self._gradients(outputs, masked, retain_graph=True))
        return self._stacked(found)

    def _same_draws(self) -> list[Tensor]:
        """The outputs for the whole batch, with the random numbers of the step."""
        with preserve_rng_state(), torch.enable_grad():
            if self.call.rng_state is not None:
                restore_random_state(self.call.rng_state, self.tensors)
            return self.run(self.params, self.tensors)

    def _axes_by_size(self) -> tuple[int, ...]:
        with preserve_rng_state():
            return self.output_axes()

    def _gradients(
        self, outputs: list[Tensor], grads: list[Tensor], *, retain_graph: bool
    ) -> list[Tensor]:
        found = torch.autograd.grad(
            outputs,
            list(self.params.values()),
            grads,
            retain_graph=retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return list(found)

    def _stacked(self, found: list[list[Tensor]]) -> dict[str, Tensor]:
        columns = zip(*found, strict=True)
        return dict(
            zip(self.params, (torch.stack(column) for column in columns), strict=True)
        )


def _only(grad: Tensor, axis: int, rows: slice) -> Tensor:
    """``grad`` with the part of every example outside ``rows`` at zero."""
    masked = torch.zeros_like(grad)
    example_rows(masked, axis, rows).copy_(example_rows(grad, axis, rows))
    return masked
