"""A layer's gradient as the sum of its parts, whose norms come with it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.layers.rule import LayerCall, LayerRule, row_slices, row_sq_norms
from noisekit.core.reductions import sq_norms


@dataclass(frozen=True, slots=True)
class GradientPieces:
    """One parameter's gradient, and statistics of its parts.

    Attributes:
        total: The gradient.
        sq_norms: Squared norm of every part: one per example, or one per chunk.
        square_sum: Squares of the examples' gradients, summed element by element.
    """

    total: Tensor
    sq_norms: Tensor
    square_sum: Tensor | None = None


def example_pieces(
    rule: LayerRule, call: LayerCall, names: Collection[str], *, square_sums: bool
) -> dict[str, GradientPieces]:
    """Return the gradients of ``names``, and the norms of their examples' own ones.

    Where the gradients of the examples are formed, they are formed once, a few
    examples at a time; where norms alone are cheaper, gradient and norms are computed
    apart.

    Args:
        rule: The layer's.
        call: Its call.
        names: Its parameters.
        square_sums: Whether element-wise squares are wanted as well.
    """
    if not (square_sums or rule.splits(call)):
        totals = rule.summed_grads(call, names, slice(0, call.num_examples))
        norms = rule.sq_norms(call, names)
        return {name: GradientPieces(totals[name], norms[name]) for name in names}
    return {name: _split(rule, call, name, square_sums) for name in names}


def _split(
    rule: LayerRule, call: LayerCall, name: str, square_sums: bool
) -> GradientPieces:
    total: Tensor | None = None
    squares: Tensor | None = None
    norms = []
    for rows in row_slices(call.num_examples, rule.working_size(call, (name,))):
        grads = rule.example_grads(call, (name,), rows)[name]
        norms.append(row_sq_norms(grads))
        part = grads.sum(0)
        total = part if total is None else total.add_(part)
        if square_sums:
            part = grads.square().sum(0)
            squares = part if squares is None else squares.add_(part)
    assert total is not None
    return GradientPieces(total, torch.cat(norms), squares)


def chunk_pieces(
    rule: LayerRule, call: LayerCall, names: Collection[str], chunks: Sequence[slice]
) -> dict[str, GradientPieces]:
    """Return the gradients of ``names`` as sums over chunks of the examples."""
    parts = [rule.summed_grads(call, names, rows) for rows in chunks]
    found = {}
    for name in names:
        sums = [part[name] for part in parts]
        norms = sq_norms(sums)
        total = sums[0]
        for part in sums[1:]:
            total = total + part
        found[name] = GradientPieces(total, norms)
    return found
