r"""Per-example norms of a weight that several calls add to, without forming gradients.

With the contributions :math:`u^{(k)}` of the calls,

.. math:: |u|^2 = \sum_k |u^{(k)}|^2 + 2 \sum_{k<l} \langle u^{(k)}, u^{(l)} \rangle

where every inner product is one of Gram matrices over the positions of both calls: a
table of a large vocabulary that is the output layer's weight too is never formed.
"""

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from noisekit.core.layers.embedding import EmbeddingRule, occurrences
from noisekit.core.layers.linear import LinearRule, gram_cost, positions
from noisekit.core.layers.rule import LayerCall, LayerRule, over_rows

Contribution = tuple[LayerRule, LayerCall]
"""A call that adds to the weight, and how it is read."""


def shared_weight_sq_norms(contributions: Sequence[Contribution]) -> Tensor | None:
    """Return ``|u_i|²`` ``(N,)``; ``None`` where forming the gradients costs less.

    Differences of large terms round like the largest of them.
    """
    if not all(type(rule) in (LinearRule, EmbeddingRule) for rule, _ in contributions):
        return None
    pairs = list(combinations(contributions, 2))
    if _cost(contributions, pairs) >= _cost_of_gradients(contributions):
        return None
    total = sum(
        rule.sq_norms(call, ("weight",))["weight"] for rule, call in contributions
    )
    assert isinstance(total, Tensor)
    for first, second in pairs:
        total = total + 2 * _inner_products(first, second)
    return total.clamp_(min=0)


def _shape(contribution: Contribution) -> tuple[int, int, int]:
    """Positions per example, and rows and columns of the weight."""
    rule, call = contribution
    rows, columns = call.module.get_parameter("weight").shape
    found = (
        occurrences(call)[0] if isinstance(rule, EmbeddingRule) else positions(call)[0]
    )
    return found.shape[1], rows, columns


def _cost(
    contributions: Sequence[Contribution],
    pairs: Sequence[tuple[Contribution, Contribution]],
) -> int:
    """Multiplications per example by Gram matrices."""
    total = 0
    for contribution in contributions:
        length, rows, columns = _shape(contribution)
        embeds = isinstance(contribution[0], EmbeddingRule)
        total += length * columns if embeds else gram_cost(length, rows + columns)
    for first, second in pairs:
        (t, rows, columns), (s, _, _) = _shape(first), _shape(second)
        both = all(isinstance(rule, LinearRule) for rule, _ in (first, second))
        total += t * s * (columns + (rows if both else 1))
    return total


def _cost_of_gradients(contributions: Sequence[Contribution]) -> int:
    """Operations per example where its gradient is formed: three passes over it too."""
    _, rows, columns = _shape(contributions[0])
    lengths = [
        _shape(one)[0] for one in contributions if not isinstance(one[0], EmbeddingRule)
    ]
    return (sum(lengths) + 3) * rows * columns


def _inner_products(first: Contribution, second: Contribution) -> Tensor:
    """``<u_i, v_i>`` of the contributions of two calls ``(N,)``."""
    embeds = [isinstance(rule, EmbeddingRule) for rule, _ in (first, second)]
    if all(embeds):
        return _of_embeddings(first[1], second[1])
    if not any(embeds):
        return _of_linears(first[1], second[1])
    linear, embedding = (second, first) if embeds[0] else (first, second)
    return _of_both(linear[1], embedding[1])


def _of_linears(first: LayerCall, second: LayerCall) -> Tensor:
    r""":math:`\sum_{ts} \langle a_t, a'_s \rangle \langle b_t, b'_s \rangle`."""
    (a, b), (c, d) = positions(first), positions(second)

    def products(rows: slice) -> Tensor:
        return ((a[rows] @ c[rows].mT) * (b[rows] @ d[rows].mT)).sum((1, 2))

    return over_rows(products, len(a), 2 * a.shape[1] * c.shape[1])


def _of_embeddings(first: LayerCall, second: LayerCall) -> Tensor:
    r""":math:`\sum_{ts} [i_t = j_s] \langle g_t, h_s \rangle`."""
    (i, g), (j, h) = occurrences(first), occurrences(second)

    def products(rows: slice) -> Tensor:
        equal = i[rows, :, None] == j[rows, None, :]  # (n, T, S)
        return ((g[rows] @ h[rows].mT) * equal).sum((1, 2))

    return over_rows(products, len(i), 2 * i.shape[1] * j.shape[1])


def _of_both(linear: LayerCall, embedding: LayerCall) -> Tensor:
    r""":math:`\sum_{ts} b_{t, j_s} \langle a_t, g_s \rangle`."""
    (a, b), (j, g) = positions(linear), occurrences(embedding)

    def products(rows: slice) -> Tensor:
        tokens = j[rows, None, :].expand(-1, a.shape[1], -1)  # (n, T, S)
        return (b[rows].gather(2, tokens) * (a[rows] @ g[rows].mT)).sum((1, 2))

    return over_rows(products, len(a), 2 * a.shape[1] * j.shape[1])
