r"""The rule for recurrent layers: their cells are linear layers at every time step.

The whole batch runs through the layer once more, step by step, so that the gradients
of the cells' inputs can be read. With those of the input side :math:`b_t`, of the
hidden side :math:`c_t`, and the hidden states :math:`h_t`, an example's gradients are

.. math:: \sum_t b_t x_t^\top, \quad \sum_t c_t h_{t-1}^\top, \quad \sum_t b_t, \quad
          \sum_t c_t

as those of a linear layer over as many positions.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.layers.batch_axis import examples_first
from noisekit.core.layers.linear import LinearRule
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.layers.rule import LayerCall, row_sq_norms

_LINEAR = LinearRule()
_KINDS = (nn.RNN, nn.LSTM, nn.GRU)


class RecurrentReplay(ModuleReplay):
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` on tensors; all else is replayed as ever.

    Sequences of different lengths, dropout between layers, projections, autocast and
    half precision are left to the replay of the module.
    """

    name = "recurrent"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether ``module`` runs PyTorch's own forward on its own parameters."""
        return (
            isinstance(module, nn.RNNBase)
            and type(module) in _KINDS
            and "forward" not in vars(module)
            and not getattr(module, "proj_size", 0)
            # Parametrised, pruned and dropped weights have other names.
            and set(module._parameters) == set(module._flat_weights_names)
        )

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """By Gram matrices or by the gradients themselves, as of a linear layer."""
        if not _has_cells(call):
            return super().sq_norms(call, names)
        found = {}
        for name in names:
            inputs, grads = _side(call, name)
            found[name] = (
                _LINEAR.weight_sq_norms(inputs, grads)
                if name.startswith("weight")
                else row_sq_norms(grads.sum(1))
            )
        return found

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Outer products summed over time steps."""
        if not _has_cells(call):
            return super().example_grads(call, names, rows)
        found = {}
        for name in names:
            inputs, grads = (tensor[rows] for tensor in _side(call, name))
            weight = name.startswith("weight")
            found[name] = grads.mT @ inputs if weight else grads.sum(1)
        return found

    def summed_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """One product over all rows and time steps."""
        if not _has_cells(call):
            return super().summed_grads(call, names, rows)
        found = {}
        for name in names:
            inputs, grads = (t[rows].flatten(0, 1) for t in _side(call, name))
            weight = name.startswith("weight")
            found[name] = grads.mT @ inputs if weight else grads.sum(0)
        return found


def _has_cells(call: LayerCall) -> bool:
    """Whether the gradients of the cells are there; computed once for a call.

    They are kept as the call's statistics, with the examples on the axis on which the
    layer's input has them: four tensors for each layer and direction.
    """
    if call.statistics:
        return True
    module = call.original
    given = call.args[0] if len(call.args) in (1, 2) and not call.kwargs else None
    assert isinstance(module, nn.RNNBase)
    if (
        not isinstance(given, Tensor)
        or given.dim() != 3
        or given.dtype not in (torch.float32, torch.float64)
        or call.rng_state is not None
        or call.autocast is not None
        or given.is_meta
    ):
        return False
    call.statistics = _cells(module, call)
    return True


def _side(call: LayerCall, name: str) -> tuple[Tensor, Tensor]:
    """What enters the cells on one side ``(N, T, d)``, and its gradients."""
    kind, _, place = name.partition("_l")
    module = call.original
    assert isinstance(module, nn.RNNBase)
    directions = 2 if module.bidirectional else 1
    layer, reverse = place.removesuffix("_reverse"), place.endswith("_reverse")
    start = 4 * (int(layer) * directions + reverse) + 2 * kind.endswith("hh")
    axis = call.axes[0]
    assert axis is not None
    inputs, grads = call.statistics[start : start + 2]
    return examples_first(inputs, axis), examples_first(grads, axis)


@dataclass(slots=True)
class _Cell:
    """One layer in one direction: its parameters without their own graph."""

    kind: type[nn.Module]
    relu: bool
    weights: list[Tensor]
    biases: list[Tensor | None]

    @classmethod
    def of(cls, module: nn.RNNBase, place: str) -> "_Cell":
        def get(name: str) -> Tensor | None:
            parameter = getattr(module, name, None)
            return None if parameter is None else parameter.detach()

        weights = [get(f"weight_{side}_{place}") for side in ("ih", "hh")]
        return cls(
            type(module),
            getattr(module, "nonlinearity", "tanh") == "relu",
            [weight for weight in weights if weight is not None],
            [get(f"bias_{side}_{place}") for side in ("ih", "hh")],
        )

    def step(
        self, own: Tensor, hidden: Tensor, state: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new hidden state, the cell's state, and the hidden side's input.

        Args:
            own: The input's side ``(N, G)``.
            hidden: The last hidden state ``(N, H)``.
            state: Of the cell ``(N, H)``, which only an LSTM has.
            weight: Of the hidden side, transposed ``(H, G)``.
        """
        if self.kind is nn.GRU:
            bias = self.biases[1]
            side = (
                hidden @ weight if bias is None else torch.addmm(bias, hidden, weight)
            )
            side = side if side.requires_grad else side.requires_grad_()
            gates, (z, n) = own.narrow(1, 0, hidden.shape[1]), own.chunk(3, 1)[1:]
            p, q, m = side.chunk(3, 1)
            new = torch.addcmul(n, (gates + p).sigmoid(), m).tanh()
            hidden = torch.lerp(new, hidden, (z + q).sigmoid())
            return hidden, state, side
        total = torch.addmm(own, hidden, weight)
        if self.kind is nn.LSTM:
            i, f, _, o = total.sigmoid().chunk(4, 1)
            g = total.chunk(4, 1)[2].tanh()
            state = torch.addcmul(f * state, i, g)
            return o * state.tanh(), state, total
        hidden = total.relu() if self.relu else total.tanh()
        return hidden, state, total


@dataclass(slots=True)
class _Run:
    """One layer in one direction over all time steps, time first.

    Attributes:
        inputs: ``x_t``.
        hidden: ``h_{t-1}``.
        own: The input's side of the cells, with a gradient to be asked for.
        other: The hidden side of every step where its gradients are not the same.
        outputs: ``h_t`` in the order of the input.
        last: The last hidden state and the last state of the cell.
    """

    inputs: Tensor
    hidden: Tensor
    own: Tensor
    other: list[Tensor]
    outputs: Tensor
    last: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, cell: _Cell, inputs: Tensor, h: Tensor, c: Tensor, *, back: bool
    ) -> "_Run":
        """Run the cell over ``inputs (T, N, d)``, backwards in time if ``back``."""
        own = functional.linear(inputs, cell.weights[0], cell.biases[0])  # (T, N, G)
        if cell.biases[1] is not None and cell.kind is not nn.GRU:
            own = own + cell.biases[1]
        own = own if own.requires_grad else own.requires_grad_()
        weight, steps = cell.weights[1].T, own.unbind()
        before: list[Tensor] = []
        after: list[Tensor] = []
        sides: list[Tensor] = []
        for x in reversed(steps) if back else steps:
            before.append(h.detach())
            h, c, side = cell.step(x, h, c, weight)
            after.append(h)
            sides.append(side)
        if back:
            before, after, sides = before[::-1], after[::-1], sides[::-1]
        other = sides if cell.kind is nn.GRU else []
        hidden, outputs = torch.stack(before), torch.stack(after)
        return cls(inputs.detach(), hidden, own, other, outputs, (h, c))


def _cells(module: nn.RNNBase, call: LayerCall) -> tuple[Tensor, ...]:
    """What enters all cells and its gradients, layer by layer and by direction."""
    inputs, axis = call.args[0], call.axes[0]
    time_axis = 1 - (axis or 0)
    with torch.enable_grad():
        runs, outputs = _runs(module, call, inputs.movedim(time_axis, 0))
        outputs[0] = outputs[0].movedim(0, time_axis)
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, call.grads, strict=True)
            if grad is not None
        ]
        wanted = [tensor for run in runs for tensor in (run.own, *run.other)]
        grads = torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    arrived, found = iter(grads), []
    for run in runs:
        own = next(arrived)
        sides = [next(arrived) for _ in run.other]
        other = torch.stack(sides) if sides else own
        found += [run.inputs, own, run.hidden, other]
    return tuple(tensor.movedim(0, time_axis) for tensor in found)


def _runs(
    module: nn.RNNBase, call: LayerCall, inputs: Tensor
) -> tuple[list[_Run], list[Tensor]]:
    """All layers on time-major inputs, and the module's outputs as tensors."""
    directions = 2 if module.bidirectional else 1
    count = module.num_layers * directions
    zero = inputs.new_zeros(count, inputs.shape[1], module.hidden_size)
    given = call.args[1] if len(call.args) == 2 else None
    h, c = given if isinstance(given, tuple) else (given, None)
    h, c = (zero if state is None else state for state in (h, c))
    runs: list[_Run] = []
    for layer in range(module.num_layers):
        own = []
        for direction in range(directions):
            place = f"l{layer}{'_reverse' * direction}"
            n = layer * directions + direction
            cell = _Cell.of(module, place)
            own.append(_Run.of(cell, inputs, h[n], c[n], back=bool(direction)))
        inputs = (
            torch.cat([run.outputs for run in own], 2)
            if directions > 1
            else own[0].outputs
        )
        runs += own
    outputs = [inputs, torch.stack([run.last[0] for run in runs])]
    if isinstance(module, nn.LSTM):
        outputs.append(torch.stack([run.last[1] for run in runs]))
    return runs, outputs
