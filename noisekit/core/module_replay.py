"""Per-example gradients of any module: its own call replayed, one example at a time.

The vector-Jacobian product of the module, from its captured inputs and output
gradients, needs neither the loss nor the targets. It costs a forward and a backward
pass of the module per example, vectorised where PyTorch can.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.batch_axis import example_rows
from noisekit.core.errors import LayerReadError
from noisekit.core.global_random import global_random_state_kept
from noisekit.core.layer_rules import (
    LayerCall,
    LayerRule,
    row_slices,
    row_sq_norms,
    widen,
)


class ModuleReplay(LayerRule):
    """The rule for every module without one of its own; one instance per module."""

    name = "replay"

    def __init__(self) -> None:
        self._vectorises = True

    def applies(self, module: nn.Module) -> bool:
        """Every module can be replayed."""
        return True

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Any axis, or the one that recurrent and attention modules document."""
        if isinstance(module, nn.RNNBase) and len(shape) == 3:
            axis = 0 if module.batch_first and position == 0 else 1  # states: axis 1
            return range(axis, axis + 1)
        if isinstance(module, nn.MultiheadAttention) and len(shape) == 3:
            axis = 0 if module.batch_first else 1
            return range(axis, axis + 1)
        return range(len(shape))

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Vectorised where possible, else a loop; random calls with their own draws."""
        replay = _Replay.of(call, tuple(names))
        if call.rng_state is not None or call.num_examples == 1:
            return replay.by_masked_gradients(rows)
        if self._vectorises:
            try:
                return replay.vectorised(rows)
            except Exception:
                # vmap does not know every operation, and says so in many types of
                # error; a fault of the module itself shows up in the loop again.
                self._vectorises = False
        return replay.by_examples(rows)

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """Of all ``names`` together: the replay is what costs."""
        elements = sum(call.module.get_parameter(name).numel() for name in names)
        parts = [
            {name: row_sq_norms(grads) for name, grads in found.items()}
            for rows in row_slices(call.num_examples, elements)
            for found in (self.example_grads(call, names, rows),)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def inner_products(self, call: LayerCall, tangents: dict[str, Tensor]) -> Tensor:
        """From the per-example gradients themselves."""
        elements = sum(tangent.numel() for tangent in tangents.values())
        parts = []
        for rows in row_slices(call.num_examples, elements):
            grads = self.example_grads(call, tuple(tangents), rows)
            products = [
                (widen(grads[name]) * tangent).flatten(1).sum(1)
                for name, tangent in tangents.items()
            ]
            parts.append(torch.stack(products).sum(0))
        return torch.cat(parts)


@dataclass(slots=True)
class _Replay:
    """One captured call, ready to be run again.

    Attributes:
        call: The captured call.
        params: The parameters asked for, as new leaves.
        buffers: Copies, so that a replay never writes to the model's own.
        leaves: Every input, tensor or not.
        structure: How ``leaves`` make up positional and keyword inputs.
        positions: Which leaves are tensors.
    """

    call: LayerCall
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    leaves: list[Any]  # whatever the module takes
    structure: pytree.TreeSpec
    positions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, call: LayerCall, names: Sequence[str]) -> "_Replay":
        module = call.module
        params = {
            name: module.get_parameter(name).detach().requires_grad_() for name in names
        }
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return cls(call, params, buffers, leaves, structure, positions)

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
        replaced = {**self.buffers, **params}
        outputs = torch.func.functional_call(self.call.module, replaced, args, kwargs)
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
            with torch.no_grad():
                single = self.run(self.params, self.rows_of_inputs(slice(0, 1)))
            self.call.output_axes = tuple(
                self._shrunk_axis(one.shape, grad.shape)
                for one, grad in zip(single, self.output_grads(), strict=True)
            )
        return tuple(axis for axis in self.call.output_axes if axis is not None)

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

    def by_masked_gradients(self, rows: slice) -> dict[str, Tensor]:
        """The whole batch again with the same draws, one example's gradient at a time.

        Dropout masks are drawn for the batch, so that no replay of single examples
        can repeat them.
        """
        with global_random_state_kept(), torch.enable_grad():
            if self.call.rng_state is not None:
                restore_random_state(self.call.rng_state, self.tensors)
            outputs = self.run(self.params, self.tensors)
        if self.call.num_examples == 1:
            return self._stacked(
                [self._gradients(outputs, self.output_grads(), retain_graph=False)]
            )
        axes = self._axes_by_size()
        found = []
        for i in range(rows.start, rows.stop):
            masked = [
                _only(grad, axis, i)
                for grad, axis in zip(self.output_grads(), axes, strict=True)
            ]
            found.append(self._gradients(outputs, masked, retain_graph=True))
        return self._stacked(found)

    def _axes_by_size(self) -> tuple[int, ...]:
        with global_random_state_kept():
            return self.output_axes()

    def _gradients(
        self, outputs: list[Tensor], grads: list[Tensor], *, retain_graph: bool
    ) -> list[Tensor]:
        found = torch.autograd.grad(
            outputs,
            list(self.params.values()),
            [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)],
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


def _device_of(tensors: Any) -> torch.device:  # any iterable of tensors
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _only(grad: Tensor, axis: int, example: int) -> Tensor:
    """``grad`` with every other example's part at zero."""
    masked = torch.zeros_like(grad)
    row = slice(example, example + 1)
    example_rows(masked, axis, row).copy_(example_rows(grad, axis, row))
    return masked
