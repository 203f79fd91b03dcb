"""torchvision's ResNet-50."""

from typing import Literal

from torch import nn

from noisekit.core.errors import UsageError
from noisekit.train.models.convolutional import check_images
from noisekit.train.models.section import NetworkSection


class ResNet50(NetworkSection):
    """torchvision's ResNet-50, for colour images of 224x224 and other sizes.

    Attributes:
        last_norm_zero: Whether the last BatchNorm of each block starts with zero
            weights, so that every block starts as the identity.

    Source:
        He et al. 2016, arXiv:1512.03385; the zero start: Goyal et al. 2017,
        arXiv:1706.02677, section 5.1.
    """

    name: Literal["resnet50"] = "resnet50"
    last_norm_zero: bool = False

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return the network for images with three channels."""
        channels, _, _ = check_images(self.name, input_shape, smallest=32)
        if channels != 3:
            raise UsageError(
                f"resnet50 needs images with 3 channels, got {channels}; use "
                "model.name = 'resnet'."
            )
        # Importing torchvision takes two seconds, and only this network needs it.
        from torchvision.models import resnet50

        network: nn.Module = resnet50(
            num_classes=num_classes, zero_init_residual=self.last_norm_zero
        )
        return network
