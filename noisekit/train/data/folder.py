"""Images in a folder per class."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from noisekit.core.errors import DataFileError, DataNotFoundError, UsageError
from noisekit.train.data.section import DataSection, Pools, TensorPair
from noisekit.train.section import PositiveInt

_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".webp"})
_TEST = ("test", "val", "validation")
_MOST_BYTES = 16 * 2**30


class ImageFolder(DataSection):
    """The user's images, in a folder per class, as torchvision's ``ImageFolder``.

    ``path`` has a folder per class, or ``train`` and ``test`` (or ``val``) with a
    folder per class each. Images are scaled so that the shorter side has ``size``
    pixels, and cut to the square in the middle. All of them are held in memory.

    Attributes:
        path: The folder.
        size: Height and width that images are brought to.
        channels: 3 for colour, 1 for gray.
        num_classes: Number of classes, for checks before the folder is read.
        per_class: Most images that are read of a class, first by name.
    """

    name: Literal["folder"] = "folder"
    path: str
    size: PositiveInt = 32
    channels: Literal[1, 3] = 3
    num_classes: Annotated[int, Field(ge=2)] | None = None
    per_class: PositiveInt | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Channels, then height and width."""
        return (self.channels, self.size, self.size)

    @property
    def known_classes(self) -> int | None:
        """As stated."""
        return self.num_classes

    def read(self, *, allow_download: bool) -> Pools:
        """Return the images, with pixels from 0 to 1, classes in order of their names.

        Raises:
            DataNotFoundError: If the folder has no images in folders per class.
            UsageError: If classes are not as stated, or memory would not do.
        """
        root = Path(self.path).expanduser()
        train_root = root / "train" if (root / "train").is_dir() else root
        test_root = next(
            (root / name for name in _TEST if (root / name).is_dir()), None
        )
        split = train_root != root and test_root is not None
        classes = self._classes(train_root)
        train = self._images(train_root, classes)
        test = None
        if split and test_root is not None:
            test = self._images(test_root, self._classes(test_root, like=classes))
        return Pools(train, test, len(classes), str(root))

    def _classes(self, root: Path, like: list[str] | None = None) -> list[str]:
        found = []
        if root.is_dir():
            found = sorted(path.name for path in root.iterdir() if _files(path))
        if len(found) < 2:
            raise DataNotFoundError(
                f"data set 'folder' needs a folder per class with images in it, found "
                f"{len(found)} in {root}; put images into <path>/<class>/, or into "
                "<path>/train/<class>/ and <path>/test/<class>/."
            )
        if like is not None and found != like:
            raise UsageError(
                f"{root} needs the same classes as the training images, "
                f"{', '.join(like[:5])} and so on, got {', '.join(found[:5])} and so "
                "on; bring the folders in line."
            )
        if self.num_classes not in (None, len(found)):
            raise UsageError(
                f"data.num_classes = {self.num_classes} needs as many folders, got "
                f"{len(found)} in {root}; change the number, or leave it out."
            )
        return found

    def _images(self, root: Path, classes: list[str]) -> TensorPair:
        files = [_files(root / name)[: self.per_class] for name in classes]
        paths = [path for group in files for path in group]
        needed = len(paths) * self.channels * self.size**2 * 4
        if needed > _MOST_BYTES:
            raise UsageError(
                f"{root} needs {needed / 2**30:.0f} GiB of memory as images of "
                f"{self.size}x{self.size}, more than {_MOST_BYTES / 2**30:.0f}; "
                "state a smaller data.size, or data.per_class."
            )
        inputs = torch.empty(len(paths), *self.stored_shape)
        for place, path in enumerate(paths):
            inputs[place] = self._image(path)
        labels = [number for number, group in enumerate(files) for _ in group]
        return TensorPair(inputs, torch.tensor(labels, dtype=torch.int64))

    def _image(self, path: Path) -> torch.Tensor:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB" if self.channels == 3 else "L")
        except (OSError, UnidentifiedImageError) as error:
            raise DataFileError(
                f"{path} needs to be an image: {error}; take it out of the folder."
            ) from error
        # Scales by the shorter side, and cuts the middle out.
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).float() / 255
        return pixels.reshape(self.size, self.size, self.channels).permute(2, 0, 1)


def _files(folder: Path) -> list[Path]:
    """Return the images in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _ENDINGS)
