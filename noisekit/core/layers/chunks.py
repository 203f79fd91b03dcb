"""Parts of a captured call: some of its examples alone, or sums over chunks of them."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.layers.batch_axis import WHOLE
from noisekit.core.layers.linear import LinearRule, gram_cost, gram_sq_norms
from noisekit.core.layers.per_example import Site, sum_over_rows
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.layers.rule import LayerCall, widen
from noisekit.core.reductions import sq_norms


def chunk_slices(num_examples: int, num_chunks: int) -> tuple[slice, ...]:
    """Cut a batch into chunks whose sizes differ by one example at most."""
    count = max(1, min(num_chunks, num_examples))
    bounds = [k * num_examples // count for k in range(count + 1)]
    return tuple(slice(a, b) for a, b in itertools.pairwise(bounds))


def call_of_rows(site: Site, call: LayerCall, rows: Tensor) -> LayerCall | None:
    """Return the call as if the batch had been its examples ``rows`` only.

    ``None`` where that call does not exist: draws of a random module are those of the
    whole batch.
    """
    if call.rng_state is not None:
        return None
    replayed = isinstance(site.rule, ModuleReplay)
    if not replayed and len(call.args) == 1 and not call.kwargs:
        return _layer_call_of_rows(call, rows)  # nearly every layer; pytrees are slow
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    axes = iter(call.axes)
    for position, leaf in enumerate(leaves):
        axis = next(axes, None) if isinstance(leaf, Tensor) else None
        if axis is not None and axis != WHOLE:
            leaves[position] = leaf.index_select(axis, rows)
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    axis_of_first = call.axes[0]
    output_axes: tuple[int | None, ...] = (axis_of_first,)
    if isinstance(site.rule, ModuleReplay):
        output_axes = site.rule.output_axes(call)
    along = iter(output_axes)
    grads = [
        None if grad is None else _rows_along(grad, next(along), rows)
        for grad in call.grads
    ]
    return replace(
        call,
        args=args,
        kwargs=kwargs,
        num_examples=len(rows),
        grads=grads,
        statistics=tuple(_rows_along(s, axis_of_first, rows) for s in call.statistics),
        output_axes=output_axes if replayed else (),
    )


def _layer_call_of_rows(call: LayerCall, rows: Tensor) -> LayerCall:
    """The same for a layer with one input and one output, alike in their axes."""
    axis, grad = call.axes[0], call.grads[0]
    return LayerCall(
        call.module,
        (_rows_along(call.args[0], axis, rows),),
        {},
        call.axes,
        len(rows),
        [None if grad is None else _rows_along(grad, axis, rows)],
        statistics=tuple(_rows_along(s, axis, rows) for s in call.statistics),
        before=call.before,
        autocast=call.autocast,
    )


def _rows_along(grad: Tensor, axis: int | None, rows: Tensor) -> Tensor:
    if axis is None or axis == WHOLE:
        return grad
    return grad.index_select(axis, rows)


def chunk_sq_norms(
    site: Site, call: LayerCall, names: Collection[str], chunks: Sequence[slice]
) -> dict[str, Tensor]:
    """Return ``|sum u_i|²`` over the examples of each chunk, by parameter ``(K,)``.

    All chunks together cost the arithmetic of one weight gradient; for a linear layer
    with one position per example less, by inner products inside the chunk.
    """
    found = {}
    if isinstance(site.rule, LinearRule) and "weight" in names:
        weights = _by_inner_products(call, chunks)
        if weights is not None:
            found["weight"] = weights
    left = [name for name in names if name not in found]
    if left:
        sums = [site.rule.summed_grads(call, left, rows) for rows in chunks]
        flat = [widen(grads[name]) for name in left for grads in sums]
        norms = sq_norms(flat)
        found |= dict(zip(left, norms.view(len(left), -1), strict=True))
    return found


def shared_chunk_sq_norms(
    contributions: Sequence[tuple[Site, LayerCall]],
    parameter: nn.Parameter,
    chunks: Sequence[slice],
) -> Tensor:
    """Return the same of a parameter that several calls add to: cross terms count."""
    sums = [widen(sum_over_rows(contributions, parameter, rows)) for rows in chunks]
    return sq_norms(sums)


def _by_inner_products(call: LayerCall, chunks: Sequence[slice]) -> Tensor | None:
    """``|B'A|² = <AA', BB'>`` with a chunk's inputs ``A``, output gradients ``B``."""
    if call.input.dim() != 2:
        return None
    inputs, grads = widen(call.input), widen(call.output_grad)
    fan_in, fan_out = inputs.shape[1], grads.shape[1]
    longest = max(rows.stop - rows.start for rows in chunks)
    if gram_cost(longest, fan_in + fan_out) >= longest * fan_in * fan_out:
        return None
    if longest * len(chunks) == len(inputs):  # all alike: one product for all
        alike = (len(chunks), longest, -1)
        norms = gram_sq_norms(inputs.reshape(alike), grads.reshape(alike))
    else:
        parts = [gram_sq_norms(inputs[rows], grads[rows]) for rows in chunks]
        norms = torch.stack(parts)
    # Rounding may leave a vanishing sum of products below zero.
    return norms.clamp_(min=0)
