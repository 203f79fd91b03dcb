"""The weight gradient of a convolution, as a correlation of two signals.

A transposed convolution is the adjoint of a convolution, so that in its weight
gradient the input and the output gradient change places. Everything below knows
convolutions only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from noisekit.core.layers.linear import gram_sq_norms
from noisekit.core.layers.rule import LayerCall, widen


@dataclass(frozen=True, slots=True)
class Correlation:
    """What is correlated for some examples of one call.

    Attributes:
        signal: What the weight slides over ``(n, in, *extents)``.
        response: What each of its positions is weighted with ``(n, out, *positions)``.
        kernel: Shape of the weight ``(out, in / groups, *sizes)``.
        stride: Per axis.
        padding: Zeros on both sides, per axis.
        dilation: Per axis.
        groups: Blocks of channels that do not mix.
    """

    signal: Tensor
    response: Tensor
    kernel: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, call: LayerCall, rows: slice) -> "Correlation":
        """Return that of the examples ``rows``."""
        conv = call.module
        assert isinstance(conv, _ConvNd)
        grads = widen(call.output_grad[rows])
        inputs = widen(call.input[rows]).to(grads.dtype)
        if isinstance(conv, _ConvTransposeNd):
            signal, padding = grads, _sizes(conv.padding)
            response = _all_positions(conv, signal, inputs)
        else:
            signal, padding = _padded(conv, inputs)
            response = grads
        return cls(
            signal,
            response,
            conv.weight.shape,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
        )

    def example_grads(self) -> Tensor:
        """Weight gradients ``(n, *kernel)``, as one convolution of many groups."""
        count = self.signal.shape[0]
        grads = self._weight_grad(
            self.signal.reshape(1, -1, *self.signal.shape[2:]),
            self.response.reshape(1, -1, *self.response.shape[2:]),
            count,
        )
        return grads.view(count, *self.kernel)

    def summed_grad(self) -> Tensor:
        """The weight gradient of all the examples together ``(*kernel)``."""
        return self._weight_grad(self.signal, self.response, 1)

    def _weight_grad(self, signal: Tensor, response: Tensor, copies: int) -> Tensor:
        out_channels, *rest = self.kernel
        weight = signal.new_empty(1).expand(copies * out_channels, *rest)
        grad: Tensor = torch.ops.aten.convolution_backward(
            response,
            signal,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0,) * len(self.stride),
            copies * self.groups,
            (False, True, False),
        )[1]
        return grad

    def grads_by_patches(self) -> Tensor:
        """Weight gradients as products ``(n, groups, fan_in, out / groups)``."""
        patches, response = self._by_group()
        return patches @ response.mT

    def gram_sq_norms(self) -> Tensor:
        """Squared norms ``(n,)`` from products over pairs of positions."""
        patches, response = self._by_group()
        return gram_sq_norms(patches.mT, response.mT).sum(1)

    def _by_group(self) -> tuple[Tensor, Tensor]:
        """Patches ``(n, groups, fan_in, L)``, responses ``(n, groups, out, L)``."""
        by_group = (self.signal.shape[0], self.groups, -1)
        response = self.response.flatten(2)
        patches = self._patches().reshape(*by_group, response.shape[2])
        return patches, response.reshape(*by_group, response.shape[2])

    def _patches(self) -> Tensor:
        """What each position of the response sees ``(n, in, *sizes, *positions)``."""
        pads = [pad for pad in reversed(self.padding) for _ in range(2)]
        signal = functional.pad(self.signal, pads) if any(pads) else self.signal
        sizes, positions = self.kernel[2:], self.response.shape[2:]
        steps = signal.stride()[2:]
        within = [d * s for d, s in zip(self.dilation, steps, strict=True)]
        between = [d * s for d, s in zip(self.stride, steps, strict=True)]
        return signal.as_strided(
            (*signal.shape[:2], *sizes, *positions),
            (*signal.stride()[:2], *within, *between),
        )


def _sizes(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    assert not isinstance(padding, str)  # 'same' exists for plain convolutions only
    return padding


def _all_positions(conv: _ConvTransposeNd, signal: Tensor, response: Tensor) -> Tensor:
    """The response with zeros where output padding makes room for further positions."""
    pads: list[int] = []
    for axis, size in enumerate(conv.kernel_size):
        padding, stride = _sizes(conv.padding)[axis], conv.stride[axis]
        reach = signal.shape[2 + axis] + 2 * padding - conv.dilation[axis] * (size - 1)
        pads = [0, (reach - 1) // stride + 1 - response.shape[2 + axis], *pads]
    return functional.pad(response, pads) if any(pads) else response


def _padded(conv: _ConvNd, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with all padding written out that is not zeros alike on both sides."""
    pads = conv._reversed_padding_repeated_twice
    if conv.padding_mode != "zeros":
        written = functional.pad(inputs, pads, mode=conv.padding_mode)
        return written, (0,) * len(conv.stride)
    if pads[::2] == pads[1::2]:
        return inputs, tuple(reversed(pads[::2]))
    return functional.pad(inputs, pads), (0,) * len(conv.stride)


CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
