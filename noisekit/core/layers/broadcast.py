"""The rule for parameters that are broadcast over the examples, such as positions.

A bare parameter that is added to activations gets its gradient as a sum over examples,
formed by the operation that broadcasts it. The gradient that *enters* that operation
still has the axis of the examples: each row is an example's own.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from noisekit.core.layers.rule import LayerCall, LayerRule


class BroadcastRule(LayerRule):
    """A parameter whose per-example gradients ``(N, *shape)`` are the call's."""

    name = "broadcast"

    def applies(self, module: nn.Module) -> bool:
        """No module is one: the graph of a forward pass tells which parameters are."""
        return False

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """The first: gradients are kept with the examples there."""
        return range(1)

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Rows of what has arrived."""
        return dict.fromkeys(names, call.output_grad[rows])

    def inner_products(self, call: LayerCall, tangents: dict[str, Tensor]) -> Tensor:
        """Every example's gradient times the tangent."""
        (tangent,) = tangents.values()
        return (call.output_grad * tangent).flatten(1).sum(1)


def unbroadcast(grads: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Return each example's gradient of an operand that was broadcast ``(N, *shape)``.

    Args:
        grads: The gradient of the result, with the examples on ``axis``.
        axis: An axis along which the operand has one entry, or none.
        shape: Of the operand.
    """
    rows = grads.movedim(axis, 0)  # (N, *others)
    padded = [1] * (grads.dim() - len(shape)) + list(shape)
    del padded[axis]
    summed = [
        d + 1 for d, size in enumerate(padded) if size == 1 and rows.shape[d + 1] > 1
    ]
    if summed:
        rows = rows.sum(summed, keepdim=True)
    return rows.reshape(len(rows), *shape)
