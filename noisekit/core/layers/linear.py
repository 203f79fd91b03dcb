"""The rule for linear layers: outer products, or products of Gram matrices."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from noisekit.core.layers.rule import (
    LayerCall,
    LayerRule,
    is_plain,
    over_rows,
    row_sq_norms,
    widen,
)

BLOCK = 32
"""Rows of Gram matrices formed at a time: enough for fast matrix products, few enough
that the skipped blocks below the diagonal are nearly half of all."""


def gram_sq_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    r"""Return :math:`\|\sum_t b_t a_t^\top\|_F^2` of every matrix in the batch.

    It equals :math:`\sum_{ts} \langle a_t, a_s \rangle \langle b_t, b_s \rangle`, the
    sum of the element-wise product of two Gram matrices, and takes no memory for the
    matrix itself. The Gram matrices are symmetric, so that blocks below the diagonal
    are not computed: with many positions that saves nearly half of the arithmetic.

    Args:
        inputs: The ``a_t``, as ``(*batch, T, d_in)``.
        grads: The ``b_t``, as ``(*batch, T, d_out)``.
    """
    parts = []
    for start in range(0, inputs.shape[-2], BLOCK):
        rows = slice(start, start + BLOCK)
        # (*batch, block, T - start): block rows from the diagonal to the right.
        products = inputs[..., rows, :] @ inputs[..., start:, :].mT
        products.mul_(grads[..., rows, :] @ grads[..., start:, :].mT)
        parts.append(products[..., : products.shape[-2]].sum((-2, -1)))
        if start + BLOCK < inputs.shape[-2]:
            # Each block right of the diagonal stands for its transpose as well.
            above = products[..., products.shape[-2] :].sum((-2, -1))
            parts.append(above.mul_(2))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def gram_cost(positions: int, width: int) -> int:
    """Multiplications per matrix for ``d_in + d_out = width``."""
    return positions * (positions + BLOCK) // 2 * width


class LinearRule(LayerRule):
    """``nn.Linear`` with any leading dimensions."""

    name = "linear"

    def applies(self, module: nn.Module) -> bool:
        """Whether ``module`` computes ``nn.Linear``'s own function."""
        return is_plain(module, nn.Linear)

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """All but the features."""
        return range(len(shape) - 1)

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """Two row norms, a product of Gram matrices, or the gradients themselves."""
        inputs, grads = positions(call)  # (N, T, in) and (N, T, out)
        if inputs.shape[1] == 1:
            # |b a'|_F = |a| |b|: the gradient of one position has rank one.
            bias = row_sq_norms(grads)
            both = {"weight": row_sq_norms(inputs) * bias, "bias": bias}
            return {name: both[name] for name in names}
        found = {}
        if "weight" in names:
            found["weight"] = self.weight_sq_norms(inputs, grads)
        if "bias" in names:
            found["bias"] = row_sq_norms(grads.sum(1))
        return found

    def _weight_grads(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Outer products summed over positions, in the layout of the weight."""
        return grads.mT @ inputs

    def weight_sq_norms(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Of what enters ``(N, T, in)`` and its output gradients ``(N, T, out)``."""
        num_examples, length, fan_in = inputs.shape
        fan_out = grads.shape[2]
        # Gram matrices take T^2 (in + out) multiplications, gradients T in out.
        if gram_cost(length, fan_in + fan_out) < length * fan_in * fan_out:
            return over_rows(
                lambda rows: gram_sq_norms(inputs[rows], grads[rows]),
                num_examples,
                2 * BLOCK * length,
            )
        return over_rows(
            lambda rows: row_sq_norms(self._weight_grads(inputs[rows], grads[rows])),
            num_examples,
            fan_in * fan_out,
        )

    def splits(self, call: LayerCall) -> bool:
        """Unless Gram matrices cost next to nothing, as they do for one position."""
        inputs, grads = positions(call)
        length, fan_in, fan_out = *inputs.shape[1:], grads.shape[2]
        products = gram_cost(length, fan_in + fan_out)
        return length > 1 and 4 * products > length * fan_in * fan_out

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Outer products summed over positions."""
        inputs, grads = (tensor[rows] for tensor in positions(call))
        found = {}
        if "weight" in names:
            found["weight"] = self._weight_grads(inputs, grads)
        if "bias" in names:
            found["bias"] = grads.sum(1)
        return found

    def summed_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """One product over all rows and positions."""
        inputs, grads = (tensor[rows].flatten(0, 1) for tensor in positions(call))
        found = {}
        if "weight" in names:
            found["weight"] = self._weight_grads(inputs, grads)
        if "bias" in names:
            found["bias"] = grads.sum(0)
        return found

    def square_sums(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """With one position, a product of squares; else from the gradients."""
        inputs, grads = positions(call)
        if inputs.shape[1] > 1:
            return super().square_sums(call, names)
        # (b_o a_i)^2 = b_o^2 a_i^2, so that the sum over examples is one product.
        squares = grads[:, 0].square()  # (N, out)
        found = {}
        if "weight" in names:
            found["weight"] = self._weight_grads(inputs[:, 0].square(), squares)
        if "bias" in names:
            found["bias"] = squares.sum(0)
        return found


class TransposedLinearRule(LinearRule):
    """Linear layers that keep their weight as ``(inputs, outputs)``.

    ``Conv1D`` of Hugging Face's transformers, which GPT-2 is made of.
    """

    def applies(self, module: nn.Module) -> bool:
        """Whether ``module`` is one, and runs its class's own forward."""
        kind = type(module)
        named = (kind.__module__, kind.__qualname__)
        return named == ("transformers.pytorch_utils", "Conv1D") and is_plain(
            module, kind
        )

    def _weight_grads(self, inputs: Tensor, grads: Tensor) -> Tensor:
        return inputs.mT @ grads


def positions(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Input and output gradient with all positions on one axis: ``(N, T, d)``."""
    inputs, grads = widen(call.input), widen(call.output_grad)
    if inputs.dim() == 2:
        return inputs.unsqueeze(1), grads.unsqueeze(1)
    return inputs.flatten(1, -2), grads.flatten(1, -2)
