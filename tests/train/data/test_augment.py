"""Augmentation: against torchvision, and the same picture whatever the batch."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from noisekit.core.errors import UsageError
from noisekit.train.data.augment import Augmentation, AugmentSpec, augmented
from noisekit.train.data.section import TensorPair
from noisekit.train.data.update_batches import UpdateBatches

SHAPES = [(1, 9, 9), (3, 8, 12)]
ALL = AugmentSpec(flip=True, rotate_degrees=20.0, shift=0.2, crop_padding=2)


def images(shape: tuple[int, ...], count: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, *shape, generator=generator, dtype=torch.float64)


def draws_for(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 6, generator=generator)


def by_torchvision(image: Tensor, draw: Tensor, spec: AugmentSpec) -> Tensor:
    """One image at a time, through torchvision's functional transforms on zeros."""
    _, height, width = image.shape
    flip, angle, right, down, left, top = draw.tolist()
    if spec.flip and flip < 0.5:
        image = functional.horizontal_flip(image)
    if spec.rotate_degrees or spec.shift:
        image = functional.affine(
            image,
            angle=(2 * angle - 1) * spec.rotate_degrees,
            translate=[
                (2 * right - 1) * spec.shift * width,
                (2 * down - 1) * spec.shift * height,
            ],
            scale=1.0,
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
    if spec.crop_padding:
        padding = spec.crop_padding
        image = functional.pad(image, [padding] * 4)
        places = 2 * padding + 1
        image = functional.crop(
            image, math.floor(top * places), math.floor(left * places), height, width
        )
    return image


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "spec",
    [
        AugmentSpec(flip=True),
        AugmentSpec(crop_padding=3),
        AugmentSpec(flip=True, crop_padding=4),
        AugmentSpec(rotate_degrees=30.0),
        AugmentSpec(shift=0.3),
        AugmentSpec(rotate_degrees=15.0, shift=0.2, flip=True),
    ],
    ids=str,
)
def test_pictures_are_torchvision_s(spec: AugmentSpec, shape: tuple[int, ...]) -> None:
    """Image by image, with the same angles and offsets.

    Catches: a rotation the other way; width and height exchanged; a flip after the
    crop; coordinates that are half a pixel off.
    """
    batch, draws = images(shape), draws_for(16)
    found = augmented(batch, draws, spec, fill=torch.zeros(1, shape[0], 1, 1).double())
    for place, image in enumerate(batch):
        wanted = by_torchvision(image, draws[place], spec)
        exact = not spec.interpolates
        torch.testing.assert_close(
            found[place], wanted, rtol=0, atol=0 if exact else 1e-5
        )
    assert not torch.equal(found, batch)


def test_interpolation_and_crop_meet_in_one_pass() -> None:
    """A crop by whole pixels moves an interpolated image exactly.

    Catches: an offset that is rotated, or counted twice.
    """
    batch, draws = images((1, 12, 12)), draws_for(16)
    turned = AugmentSpec(rotate_degrees=20.0)
    both = turned.model_copy(update={"crop_padding": 3})
    zero = torch.zeros(1, 1, 1, 1).double()
    rotated = augmented(batch, draws, turned, fill=zero)
    found = augmented(batch, draws, both, fill=zero)
    for place in range(16):
        left, top = ((draws[place, 4:] * 7).floor() - 3).long().tolist()
        inside = (
            slice(max(0, -top), 12 - max(0, top)),
            slice(max(0, -left), 12 - max(0, left)),
        )
        source = (
            slice(max(0, top), 12 + min(0, top)),
            slice(max(0, left), 12 + min(0, left)),
        )
        torch.testing.assert_close(
            found[place, 0][inside], rotated[place, 0][source], rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("spec", [ALL, AugmentSpec(flip=True, crop_padding=2)], ids=str)
def test_standardising_commutes_with_augmenting(spec: AugmentSpec) -> None:
    """What comes in from outside is black, not the mean.

    Catches: filling standardised images with zeros.
    """
    raw = images((2, 10, 10))
    raw[0, :, 0, 0] = 0.0  # every channel has a black pixel
    mean, deviation = torch.tensor([0.3, 0.6]), torch.tensor([0.2, 0.5])
    scaled = (raw - mean[:, None, None]) / deviation[:, None, None]
    places = torch.arange(16)
    before = Augmentation(spec, raw, seed=5)(raw, places, 0)
    after = Augmentation(spec, scaled, seed=5)(scaled, places, 0)
    wanted = (before - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(after, wanted)


def pictures(count: int, microbatch: int | None, passes: int) -> dict:
    """By pass and example, the picture that a run with batches of ``count`` sees."""
    train = TensorPair(images((1, 6, 6), 24), torch.arange(24))
    batches = UpdateBatches(train, seed=3, device="cpu")
    seen = {}
    for begin in range(0, passes * 24, count):
        stretch = min(count, passes * 24 - begin)
        place = begin
        for part in batches.batch(begin, stretch, microbatch=microbatch, augment=ALL):
            for picture, example in zip(
                part.inputs, part.targets.tolist(), strict=True
            ):
                seen[place // 24, example] = picture
                place += 1
    return seen


@pytest.mark.parametrize(
    ("count", "microbatch"),
    [(24, None), (8, None), (8, 3), (1, None), (7, None), (31, 5)],
)
def test_the_same_picture_in_the_same_pass_whatever_the_batch(
    count, microbatch
) -> None:
    """Batches over the end of a pass included; another pass has another picture.

    Catches: draws per batch or per update; the pass of the batch's first example for
    all of it.
    """
    wanted, found = pictures(4, None, 3), pictures(count, microbatch, 3)
    assert found.keys() == wanted.keys()
    assert len(found) == 3 * 24
    for key, picture in wanted.items():
        torch.testing.assert_close(found[key], picture, rtol=1e-12, atol=1e-12)
    for example in range(24):
        assert not torch.equal(wanted[0, example], wanted[1, example])


def test_pass_in_the_middle_needs_no_earlier_one() -> None:
    """A resumed run makes the draws of its pass from their name.

    Catches: draws that depend on how often they were made; one draw per batch.
    """
    batch = images((1, 6, 6), 1).expand(24, -1, -1, -1).contiguous()
    places = torch.arange(24)
    fresh = Augmentation(ALL, batch, seed=3)
    gone_through = Augmentation(ALL, batch, seed=3)
    for number in range(5):
        last = gone_through(batch, places, 24 * number)
    found = fresh(batch, places, 24 * 4)
    assert torch.equal(found, last)
    assert len({tuple(p.flatten().tolist()) for p in found}) == 24
    other = Augmentation(ALL, batch, seed=4)(batch, places, 24 * 4)
    assert not torch.equal(found, other)


def test_half_of_the_images_are_flipped() -> None:
    """Catches: all or none; a share that depends on the batch."""
    batch = torch.arange(6.0).reshape(1, 1, 1, 6).expand(4000, 1, 1, 6).contiguous()
    turned = Augmentation(AugmentSpec(flip=True), batch, seed=0)
    found = turned(batch, torch.arange(4000), 0)
    share = (found[:, 0, 0, 0] == 5).double().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / 4000**0.5


def test_vectors_are_refused() -> None:
    """What has no height cannot be shifted."""
    with pytest.raises(
        UsageError, match=r"augment needs images .* got .*\(20,\); leave"
    ):
        Augmentation(ALL, torch.zeros(4, 20), seed=0)
