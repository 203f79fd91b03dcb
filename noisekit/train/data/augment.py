"""Random shifts, rotations, flips and crops of images, drawn per pass and example."""

from math import pi
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import grid_sample

from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream
from noisekit.train.section import NonNegativeInt, Section

_FLIP, _ANGLE, _SHIFT_X, _SHIFT_Y, _LEFT, _TOP = range(6)
_NUM_DRAWS = 6


class AugmentSpec(Section):
    """How training images are changed anew in each pass; by default not at all.

    In this order: flipped, rotated about the center, shifted, padded and cropped.

    Attributes:
        flip: Whether every second image, at random, is mirrored left to right.
        rotate_degrees: Largest angle, to both sides.
        shift: Largest shift, as a share of width and of height, to all sides.
        crop_padding: Pixels that are added on each side before an image of the
            original size is cut out.
    """

    flip: bool = False
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.0
    crop_padding: NonNegativeInt = 0

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        return self != UNCHANGED

    @property
    def interpolates(self) -> bool:
        """Whether pixels come to lie between those of the original."""
        return self.rotate_degrees > 0 or self.shift > 0


UNCHANGED = AugmentSpec()


class Augmentation:
    """Changes the images of one run.

    The draws of an image are a function of the seed, the pass and its place in the
    training set. So an example is the same picture in the same pass whatever the
    batch size, and a resumed run needs no state.

    What comes in from outside of an image is the smallest value of its channel over
    the training images: black, also after standardising.

    Attributes:
        spec: What is changed.
    """

    def __init__(self, spec: AugmentSpec, images: Tensor, seed: int) -> None:
        if images.dim() != 4:
            raise UsageError(
                "augment needs images of shape (channels, height, width), got examples "
                f"of shape {tuple(images.shape[1:])}; leave augment out."
            )
        self.spec = spec
        self._seed = seed
        self._num_examples = len(images)
        self._device = images.device
        self._fill = images.amin((0, 2, 3)).reshape(1, -1, 1, 1)
        self._draws: dict[int, Tensor] = {}

    def __call__(self, images: Tensor, examples: Tensor, begin: int) -> Tensor:
        """Return the images of a stretch of the stream, changed.

        Args:
            images: Shape ``(n, channels, height, width)``.
            examples: Their places in the training set, ``(n,)``.
            begin: Place of the first in the stream of permutations, which says in
                which pass each of them is seen.
        """
        draws = torch.cat(
            [
                self._draws_of(number)[part]
                for number, part in self._passes(examples, begin)
            ]
        )
        return augmented(images, draws, self.spec, fill=self._fill)

    def _passes(self, examples: Tensor, begin: int) -> list[tuple[int, Tensor]]:
        """Return the examples of each pass that the stretch goes through."""
        number, place = divmod(begin, self._num_examples)
        parts = []
        while len(examples):
            count = self._num_examples - place
            parts.append((number, examples[:count]))
            examples, number, place = examples[count:], number + 1, 0
        return parts

    def _draws_of(self, number: int) -> Tensor:
        """Return the draws of all examples in a pass, ``(num_examples, 6)``."""
        if number not in self._draws:
            for old in [known for known in self._draws if known != number - 1]:
                del self._draws[old]
            generator = stream(self._seed, "augment", number)
            draws = torch.rand(self._num_examples, _NUM_DRAWS, generator=generator)
            self._draws[number] = draws.to(self._device)
        return self._draws[number]


def augmented(
    images: Tensor, draws: Tensor, spec: AugmentSpec, *, fill: Tensor
) -> Tensor:
    """Return images changed by given draws, one row of them per image.

    Without rotation and shift every pixel is one of the original; otherwise pixels are
    interpolated linearly, once.

    Args:
        images: Shape ``(n, channels, height, width)``.
        draws: Numbers from 0 to 1, shape ``(n, 6)``.
        spec: What is changed, and how much at most.
        fill: What comes in from outside, of a shape that fits the images.
    """
    flipped = draws[:, _FLIP] < (0.5 if spec.flip else 0.0)
    offsets = (draws[:, [_LEFT, _TOP]] * (2 * spec.crop_padding + 1)).floor()
    offsets = offsets - spec.crop_padding  # (n, 2), from -padding to padding
    if spec.interpolates:
        return _warped(images, draws, spec, flipped, offsets, fill)
    return _moved(images, flipped, offsets.long(), fill)


def _moved(images: Tensor, flipped: Tensor, offsets: Tensor, fill: Tensor) -> Tensor:
    """Gather each pixel from where it comes."""
    height, width = images.shape[-2:]
    columns = torch.arange(width, device=images.device) + offsets[:, :1]  # (n, W)
    rows = torch.arange(height, device=images.device) + offsets[:, 1:]  # (n, H)
    inside = ((rows >= 0) & (rows < height))[:, :, None]
    inside = inside & ((columns >= 0) & (columns < width))[:, None, :]  # (n, H, W)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # (n, H W)
    index = index[:, None, :].expand(-1, images.shape[1], -1)
    pixels = images.flatten(2).gather(2, index).view_as(images)
    return torch.where(inside[:, None], pixels, fill)


def _warped(
    images: Tensor,
    draws: Tensor,
    spec: AugmentSpec,
    flipped: Tensor,
    offsets: Tensor,
    fill: Tensor,
) -> Tensor:
    """Interpolate each pixel at where it comes from, measured from the center."""
    height, width = images.shape[-2:]
    draws, offsets = draws.to(images.dtype), offsets.to(images.dtype)
    signed = 2 * draws - 1
    angle = signed[:, _ANGLE, None, None] * (spec.rotate_degrees * pi / 180)
    shift_x = signed[:, _SHIFT_X, None, None] * (spec.shift * width)
    shift_y = signed[:, _SHIFT_Y, None, None] * (spec.shift * height)
    across = torch.arange(width, device=images.device) - (width - 1) / 2
    down = torch.arange(height, device=images.device) - (height - 1) / 2
    x = across + offsets[:, 0, None, None] - shift_x  # (n, 1, W)
    y = down[:, None] + offsets[:, 1, None, None] - shift_y  # (n, H, 1)
    # The rotation is undone: the inverse is the transpose.
    source_x = angle.cos() * x + angle.sin() * y
    source_y = angle.cos() * y - angle.sin() * x
    source_x = torch.where(flipped[:, None, None], -source_x, source_x)
    # grid_sample's coordinates: -1 and 1 are the outer edges of the outer pixels.
    grid = torch.stack([2 * source_x / width, 2 * source_y / height], dim=-1)
    # It fills with zeros, so that zero has to be what comes in from outside.
    moved = grid_sample(images - fill, grid.to(images.dtype), align_corners=False)
    return moved + fill
