"""The rule for embedding tables: output gradients summed over equal indices."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.layers.rule import (
    LayerCall,
    LayerRule,
    is_plain,
    over_rows,
    row_slices,
    row_sq_norms,
    widen,
)


class EmbeddingRule(LayerRule):
    """``nn.Embedding``: an example's gradient has as many rows as it has indices.

    ``max_norm`` makes no difference: it rescales the table before the lookup, and the
    gradient of a lookup does not depend on the table.
    """

    name = "embedding"

    def applies(self, module: nn.Module) -> bool:
        """Whether it is dense and counts every occurrence alike."""
        return (
            is_plain(module, nn.Embedding)
            and not module.sparse
            and not module.scale_grad_by_freq
        )

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Any axis of the indices."""
        return range(len(shape))

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """Squared norms of the rows that each example's indices add up to."""
        indices, grads = occurrences(call)
        (num_examples, positions), width = indices.shape, grads.shape[2]
        if positions == 1:
            return {"weight": row_sq_norms(grads)}
        num_rows = call.module.get_parameter("weight").shape[0]
        found = over_rows(
            lambda rows: row_sq_norms(_rows_used(indices[rows], grads[rows], num_rows)),
            num_examples,
            min(positions, num_rows) * width,
        )
        return {"weight": found}

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """The whole table per example."""
        indices, grads = (tensor[rows] for tensor in occurrences(call))
        num_rows = call.module.get_parameter("weight").shape[0]
        return {"weight": _added_to_slots(indices, grads, num_rows)}

    def summed_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """One table, to which every occurrence adds its output gradient."""
        indices, grads = (tensor[rows] for tensor in occurrences(call))
        table = grads.new_zeros(call.module.get_parameter("weight").shape)
        return {"weight": table.index_add_(0, indices.flatten(), grads.flatten(0, 1))}

    def square_sums(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """One table, to which every example adds the squares of its own rows."""
        indices, grads = occurrences(call)
        table = grads.new_zeros(call.module.get_parameter("weight").shape)
        positions, width = grads.shape[1:]
        for rows in row_slices(len(indices), positions * width):
            slots = _slots(indices[rows])
            squares = _added_to_slots(slots, grads[rows], positions).square_()
            owners = torch.zeros_like(slots).scatter_(1, slots, indices[rows])
            table.index_add_(0, owners.flatten(), squares.flatten(0, 1))
        return {"weight": table}

    def inner_products(self, call: LayerCall, tangents: dict[str, Tensor]) -> Tensor:
        """Rows of the tangent looked up, times the output gradient."""
        indices, grads = occurrences(call)
        return (functional.embedding(indices, tangents["weight"]) * grads).sum((1, 2))


def occurrences(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Indices ``(N, T)`` and what each adds to its row ``(N, T, d)``."""
    module = call.module
    assert isinstance(module, nn.Embedding)
    indices = call.input.reshape(call.num_examples, -1)
    grads = widen(call.output_grad).reshape(*indices.shape, -1)
    if module.padding_idx is not None:
        grads = grads * (indices != module.padding_idx)[:, :, None]
    return indices, grads


def _rows_used(indices: Tensor, grads: Tensor, num_rows: int) -> Tensor:
    """Each example's gradient rows ``(N, rows, d)``, numbered the shorter way.

    By row of the table, or by the distinct indices of the example.
    """
    if num_rows <= indices.shape[1]:
        return _added_to_slots(indices, grads, num_rows)
    return _added_to_slots(_slots(indices), grads, indices.shape[1])


def _slots(indices: Tensor) -> Tensor:
    """Number the distinct indices of each example from zero: ``(N, T)``."""
    # Sort, count the changes along the sorted row, and undo the sort.
    ordered, order = indices.sort(1)
    numbers = torch.zeros_like(indices)
    numbers[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    return torch.zeros_like(indices).scatter_(1, order, numbers)


def _added_to_slots(slots: Tensor, grads: Tensor, num_slots: int) -> Tensor:
    """Sums over the positions of every slot: ``(N, num_slots, d)``.

    One ``index_add_`` over all examples, each with an offset of its own.
    """
    count, width = len(slots), grads.shape[2]
    first = torch.arange(0, count * num_slots, num_slots, device=slots.device)
    sums = grads.new_zeros(count * num_slots, width)
    index = (slots + first[:, None]).flatten()
    return sums.index_add_(0, index, grads.flatten(0, 1)).view(count, -1, width)
