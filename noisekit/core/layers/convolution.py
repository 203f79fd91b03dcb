"""The rule for convolutions, plain and transposed, of one to three dimensions."""

from collections.abc import Collection
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from noisekit.core.layers.correlation import CONVOLUTIONS, Correlation
from noisekit.core.layers.linear import BLOCK, gram_cost
from noisekit.core.layers.rule import (
    LayerCall,
    LayerRule,
    is_plain,
    over_rows,
    row_sq_norms,
    widen,
)

GRAM_ADVANTAGE = 2
"""Ratio of multiplications at which the Gram form pays for copying the patches."""

CACHE_SHARE = 4
"""Divides the working memory of a slice, so that it stays in the processor's cache:
twice as fast."""

FEW_CHANNELS = 4
"""Input channels up to which a grouped convolution leaves vector units idle."""


class Form(Enum):
    """Equivalent formulas for the squared norms, of different cost."""

    GROUPED = "one convolution whose groups are the examples"
    PATCHES = "a product of patches and output gradients"
    GRAM = "products over pairs of positions"


class ConvRule(LayerRule):
    """Any stride, padding, dilation and groups; transposed with output padding."""

    name = "convolution"

    def applies(self, module: nn.Module) -> bool:
        """Whether ``module`` computes the own function of one of PyTorch's kinds."""
        return any(is_plain(module, kind) for kind in CONVOLUTIONS)

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Axis 0 of a batch of images; a single image has none."""
        return range(1) if len(shape) == 2 + _dimensions(module) else range(0)

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """By the cheapest form for the sizes; of biases, from sums over positions."""
        found = {}
        if "weight" in names:
            found["weight"] = self._weight_sq_norms(call)
        if "bias" in names:
            found["bias"] = row_sq_norms(_bias_grads(call, slice(None)))
        return found

    def _weight_sq_norms(self, call: LayerCall) -> Tensor:
        form = form_for(call)

        def sq_norms(rows: slice) -> Tensor:
            correlation = Correlation.of(call, rows)
            if form is Form.GRAM:
                return correlation.gram_sq_norms()
            if form is Form.PATCHES:
                return row_sq_norms(correlation.grads_by_patches())
            return row_sq_norms(correlation.example_grads())

        return over_rows(sq_norms, call.num_examples, _working_memory(call, form))

    def working_size(self, call: LayerCall, names: Collection[str]) -> int:
        """What the gradients and the copies for them take, to stay in the cache."""
        if "weight" not in names:
            return call.output_grad[0].numel()
        return _working_memory(call, _gradient_form(call))

    def splits(self, call: LayerCall) -> bool:
        """Where no Gram matrices are cheaper."""
        return form_for(call) is not Form.GRAM

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Weight gradients by one grouped convolution, biases by sums."""
        found = {}
        if "weight" in names:
            correlation = Correlation.of(call, rows)
            if _gradient_form(call) is Form.PATCHES:
                grads = correlation.grads_by_patches().mT
                found["weight"] = grads.reshape(-1, *correlation.kernel)
            else:
                found["weight"] = correlation.example_grads()
        if "bias" in names:
            found["bias"] = _bias_grads(call, rows)
        return found

    def summed_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """The layer's own weight gradient, for some of the examples."""
        found = {}
        if "weight" in names:
            found["weight"] = Correlation.of(call, rows).summed_grad()
        if "bias" in names:
            found["bias"] = _bias_grads(call, rows).sum(0)
        return found


def form_for(call: LayerCall) -> Form:
    """Return the cheapest form by operation counts, not by timing: runs repeat."""
    conv = _conv(call)
    fan_in, out_channels = conv.weight[0].numel(), conv.weight.shape[0]
    transposed = isinstance(conv, _ConvTransposeNd)
    response = call.input if transposed else call.output_grad
    positions = response[0, 0].numel()
    # Multiplications per example: pairs of positions times channels of the Gram form,
    # positions times the weight's elements of the gradients.
    products = gram_cost(positions, fan_in + out_channels // conv.groups)
    if GRAM_ADVANTAGE * products * conv.groups < positions * out_channels * fan_in:
        return Form.GRAM
    return _gradient_form(call)


def _gradient_form(call: LayerCall) -> Form:
    """The cheaper way to the gradients themselves."""
    conv = _conv(call)
    narrow = conv.groups == 1 and conv.weight.shape[1] <= FEW_CHANNELS
    return Form.PATCHES if narrow else Form.GROUPED


def _working_memory(call: LayerCall, form: Form) -> int:
    """Elements of temporary memory per example."""
    conv = _conv(call)
    signal = call.input[0].numel()
    if form is Form.GROUPED:
        return CACHE_SHARE * max(conv.weight.numel(), signal)
    transposed = isinstance(conv, _ConvTransposeNd)
    response = call.input if transposed else call.output_grad
    positions = response[0, 0].numel()
    patches = positions * conv.weight[0].numel() * conv.groups
    if form is Form.PATCHES:
        return CACHE_SHARE * max(conv.weight.numel(), patches)
    return patches + 2 * BLOCK * positions * conv.groups


def _conv(call: LayerCall) -> _ConvNd:
    assert isinstance(call.module, _ConvNd)
    return call.module


def _dimensions(module: nn.Module) -> int:
    assert isinstance(module, _ConvNd)
    return len(module.kernel_size)


def _bias_grads(call: LayerCall, rows: slice) -> Tensor:
    return widen(call.output_grad[rows]).flatten(2).sum(2)
