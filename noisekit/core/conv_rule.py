"""The rule for convolutions: weight gradients of many examples as one grouped one."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.layer_rules import (
    LayerCall,
    LayerRule,
    is_plain,
    over_rows,
    row_sq_norms,
    widen,
)

GRAM_ADVANTAGE = 4
"""How much cheaper the Gram form must look: it unfolds its input, which costs."""

CACHE_SHARE = 4
"""Slices this much smaller stay in a processor's cache, and go twice as fast."""


class ConvRule(LayerRule):
    """``nn.Conv2d`` with any stride, padding, dilation and groups."""

    name = "convolution"

    def applies(self, module: nn.Module) -> bool:
        """Whether ``module`` computes ``nn.Conv2d``'s own function."""
        return is_plain(module, nn.Conv2d)

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Axis 0 of a batch of images; a single image has none."""
        return range(1) if len(shape) == 4 else range(0)

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """The cheaper of Gram matrices over positions and the gradients themselves."""
        found = {}
        if "weight" in names:
            found["weight"] = self._weight_sq_norms(call)
        if "bias" in names:
            found["bias"] = row_sq_norms(widen(call.output_grad).sum((2, 3)))
        return found

    def _weight_sq_norms(self, call: LayerCall) -> Tensor:
        conv = _conv(call)
        out_channels, fan_in = conv.weight.shape[0], conv.weight[0].numel()
        positions = call.output_grad.shape[2] * call.output_grad.shape[3]
        per_group = fan_in + out_channels // conv.groups
        gram_cost = GRAM_ADVANTAGE * positions * per_group * conv.groups
        if gram_cost < out_channels * fan_in:
            return over_rows(
                lambda rows: _gram_sq_norms(call, rows),
                call.num_examples,
                positions * (fan_in * conv.groups + 2 * positions * conv.groups),
            )
        return over_rows(
            lambda rows: row_sq_norms(_weight_grads(call, rows)),
            call.num_examples,
            CACHE_SHARE * max(conv.weight.numel(), call.input[0].numel()),
        )

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Weight gradients by one grouped convolution, biases by sums."""
        found = {}
        if "weight" in names:
            found["weight"] = _weight_grads(call, rows)
        if "bias" in names:
            found["bias"] = widen(call.output_grad[rows]).sum((2, 3))
        return found


def _conv(call: LayerCall) -> nn.Conv2d:
    assert isinstance(call.module, nn.Conv2d)
    return call.module


def _padded(conv: nn.Conv2d, inputs: Tensor) -> tuple[Tensor, list[int]]:
    """The input with all padding written out that is not plain zeros on both sides."""
    if conv.padding_mode != "zeros":
        pads = conv._reversed_padding_repeated_twice
        return functional.pad(inputs, pads, mode=conv.padding_mode), [0, 0]
    if isinstance(conv.padding, str):
        return functional.pad(inputs, conv._reversed_padding_repeated_twice), [0, 0]
    return inputs, list(conv.padding)


def _weight_grads(call: LayerCall, rows: slice) -> Tensor:
    """Per-example weight gradients ``(c, *weight.shape)``.

    Folding examples into groups makes one weight gradient of a grouped convolution
    give those of all examples.
    """
    conv = _conv(call)
    grads = widen(call.output_grad[rows]).contiguous()
    inputs, padding = _padded(conv, widen(call.input[rows]).to(grads.dtype))
    count = grads.shape[0]
    weight = grads.new_empty(1).expand(
        count * conv.weight.shape[0], *conv.weight.shape[1:]
    )
    weight_grads: Tensor = torch.ops.aten.convolution_backward(
        grads.reshape(1, -1, *grads.shape[2:]),
        inputs.reshape(1, -1, *inputs.shape[2:]),
        weight,
        None,
        list(conv.stride),
        padding,
        list(conv.dilation),
        False,
        [0, 0],
        count * conv.groups,
        [False, True, False],
    )[1]
    return weight_grads.view(count, *conv.weight.shape)


def _gram_sq_norms(call: LayerCall, rows: slice) -> Tensor:
    conv = _conv(call)
    grads = widen(call.output_grad[rows]).flatten(2)  # (c, out, L)
    inputs, padding = _padded(conv, widen(call.input[rows]).to(grads.dtype))
    patches = functional.unfold(
        inputs, conv.kernel_size, conv.dilation, tuple(padding), conv.stride
    )  # (c, in * k * k, L)
    by_group = (grads.shape[0] * conv.groups, -1, grads.shape[2])
    grads, patches = grads.reshape(by_group), patches.reshape(by_group)
    products = (patches.mT @ patches).mul_(grads.mT @ grads)  # (c * groups, L, L)
    return products.sum((1, 2)).view(-1, conv.groups).sum(1)
