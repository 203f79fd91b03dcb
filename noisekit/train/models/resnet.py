"""Residual networks for small images, of depth 6k + 2."""

from typing import Annotated, Literal

from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from noisekit.train.models.convolutional import Norm, check_images, norm_of_channels
from noisekit.train.models.section import NetworkSection
from noisekit.train.section import PositiveInt

_WIDTHS = (16, 32, 64)


def _six_k_and_two(depth: int) -> int:
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth needs to be 8, 14, 20, 26, 32 or so, got {depth}")
    return depth


class ResNet(NetworkSection):
    """He's residual network for CIFAR: three stages of 16, 32 and 64 channels.

    Shortcuts between stages have no parameters: every second pixel, and zeros for the
    channels that are added. Convolutions have a bias only where no layer normalizes
    after them. All layers but the last are convolutions, so that ``norm = "batch"``
    and ``"batch_convolutions"`` are the same network.

    Attributes:
        depth: Layers with weights: 6k + 2, such as 8, 20, 32, 44.
        norm: Normalization after each convolution.

    Source:
        He et al. 2016, arXiv:1512.03385, section 4.2.
    """

    name: Literal["resnet"] = "resnet"
    depth: Annotated[PositiveInt, AfterValidator(_six_k_and_two)] = 20
    norm: Norm = "batch"

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        """Return the network for images of shape (channels, height, width)."""
        channels, _, _ = check_images(self.name, input_shape, smallest=4)
        before = _WIDTHS[0]
        layers: list[nn.Module] = [
            _NormalizedConvolution(channels, before, stride=1, norm=self.norm),
            nn.ReLU(),
        ]
        for stage, width in enumerate(_WIDTHS):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(before, width, stride, self.norm))
                before = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(before, num_classes))


class ResidualBlock(nn.Module):
    """``relu(x + f(x))``, where ``f`` is two 3x3 convolutions with a ReLU between."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = _NormalizedConvolution(before, after, stride=stride, norm=norm)
        self.second = _NormalizedConvolution(after, after, stride=1, norm=norm)
        self._stride = stride
        self._added = after - before

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's output, of half the height and width at stride 2."""
        residual = self.second(relu(self.first(inputs)))
        shortcut = inputs[:, :, :: self._stride, :: self._stride]
        if self._added:
            # Half of the new channels in front, half behind, all zero.
            half = self._added // 2
            shortcut = pad(shortcut, (0, 0, 0, 0, half, self._added - half))
        return relu(shortcut + residual)


class _NormalizedConvolution(nn.Sequential):
    """A 3x3 convolution and the layer that normalizes after it, if any."""

    def __init__(self, before: int, after: int, *, stride: int, norm: Norm) -> None:
        normalization = norm_of_channels(norm, after)
        convolution = nn.Conv2d(
            before, after, 3, stride=stride, padding=1, bias=normalization is None
        )
        layers = (
            [convolution] if normalization is None else [convolution, normalization]
        )
        super().__init__(*layers)
