r"""The weight gradient of a convolution, as a correlation of two signals.

With input ``x``, output gradient ``r``, stride ``s``, dilation ``d`` and padding ``p``,
in one dimension and one group:

.. math:: \frac{\partial L}{\partial W_{oik}} = \sum_l r_{ol}\; x_{i,\, s l + d k - p}

A transposed convolution is the adjoint of a convolution, so that in its weight
gradient the input and the output gradient change places. Everything below is written
for convolutions only.
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
    """The two signals of some examples of one call, and the convolution's geometry.

    Attributes:
        signal: ``x``, over which the kernel moves ``(n, in, *extents)``.
        response: ``r``, one value per position of the kernel ``(n, out, *positions)``.
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
        """Weight gradients ``(n, *kernel)``, by one convolution with ``n groups``.

        Groups of channels do not mix, so that examples laid out as groups of a single
        image have separate gradients (Rochette et al. 2019, arXiv:1912.06015).
        """
        count = self.signal.shape[0]
        # (n, in, *extents) -> (1, n in, *extents), and the same for the response.
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
        # Only the weight's shape is read, so that one element stands for all of it.
        weight = signal.new_empty(1).expand(copies * out_channels, *rest)
        grad: Tensor = torch.ops.aten.convolution_backward(
            response,
            signal,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,  # not transposed
            (0,) * len(self.stride),
            copies * self.groups,
            (False, True, False),  # of the weight only
        )[1]
        return grad

    def grads_by_patches(self) -> Tensor:
        """Weight gradients ``(n, groups, fan_in, out / groups)``, as matrix products.

        The sum over positions ``l`` is a product of unfolded patches ("im2col"),
        ``(fan_in, L)``, with responses ``(L, out)``.
        """
        patches, response = self._by_group()
        return patches @ response.mT

    def gram_sq_norms(self) -> Tensor:
        """Squared norms ``(n,)``, as ``sum_lm <x_l, x_m> <r_l, r_m>`` over patches."""
        patches, response = self._by_group()
        return gram_sq_norms(patches.mT, response.mT).sum(1)

    def _by_group(self) -> tuple[Tensor, Tensor]:
        """Patches ``(n, groups, fan_in, L)``, responses ``(n, groups, out, L)``."""
        by_group = (self.signal.shape[0], self.groups, -1)
        response = self.response.flatten(2)
        patches = self._patches().reshape(*by_group, response.shape[2])
        return patches, response.reshape(*by_group, response.shape[2])

    def _patches(self) -> Tensor:
        """The patch under each position of the kernel ``(n, in, *sizes, *positions)``.

        Element ``[k, l]`` is ``x[s l + d k]``: a strided view of the padded signal,
        which copies nothing until it is reshaped. Its elements overlap in memory, so
        that it must not be written to.
        """
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
    """The response, padded with zeros to all positions of the kernel.

    A signal of ``e`` extents has ``(e + 2 p - d (k - 1) - 1) // s + 1`` of them; output
    padding makes the signal longer than the response is for.
    """
    pads: list[int] = []  # in the order of functional.pad: last axis first
    for axis, size in enumerate(conv.kernel_size):
        padding, stride = _sizes(conv.padding)[axis], conv.stride[axis]
        reach = signal.shape[2 + axis] + 2 * padding - conv.dilation[axis] * (size - 1)
        pads = [0, (reach - 1) // stride + 1 - response.shape[2 + axis], *pads]
    return functional.pad(response, pads) if any(pads) else response


def _padded(conv: _ConvNd, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input, and its zero padding per axis; other padding is written out.

    ``aten.convolution_backward`` takes zeros only, as many on both sides of an axis:
    reflection and the like, and ``padding="same"`` with an even kernel, are neither.
    """
    pads = conv._reversed_padding_repeated_twice  # (left, right), last axis first
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
