"""A figure together with the numbers in it."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from pandas import DataFrame

from noisekit.core.errors import StorageError
from noisekit.figures.theme import themed

PNG_DPI = 250
FORMATS = ("pdf", "svg", "png", "csv", "parquet")
"""File name endings that ``Plot.save`` writes."""

_COORDINATES = re.compile(rb'( (?:d|x|y)=")([^"]*)"')
_LONG_NUMBER = re.compile(rb"-?\d+\.\d{3,}")
_AROUND_COMMAND = re.compile(rb"\s*([MLQCz])\s*")
_INDENTED = re.compile(rb"\n\s+")

# No date and no version: the same data give the same bytes.
_METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "png": {"Software": None},
}


@dataclass(frozen=True, slots=True, eq=False)
class Plot:
    """A drawn figure, the table behind it and what to write below it.

    Attributes:
        figure: The Matplotlib figure, at the size at which it is printed.
        table: Every number that was drawn, one row a mark.
        name: Stem of the files.
        caption: What is plotted, how means and intervals were made, and how many
            values could not be drawn.
    """

    figure: Figure
    table: DataFrame
    name: str
    caption: str

    def save(self, directory: Path | str) -> dict[str, Path]:
        """Write PDF, SVG, PNG, CSV and Parquet and return their paths by ending.

        Raises:
            StorageError: If the folder cannot be written to.
        """
        with writable_folder(directory, what=f"figure {self.name!r}") as folder:
            paths = {}
            for ending in _METADATA:
                paths[ending] = folder / f"{self.name}.{ending}"
                paths[ending].write_bytes(self.rendered(ending))
            return paths | write_table(self.table, folder, self.name)

    def rendered(self, ending: str) -> bytes:
        """Return the bytes of the figure as ``"pdf"``, ``"svg"`` or ``"png"``."""
        buffer = io.BytesIO()
        with themed():
            self.figure.savefig(
                buffer, format=ending, dpi=PNG_DPI, metadata=_METADATA[ending]
            )
        drawn = buffer.getvalue()
        return _shortened(drawn) if ending == "svg" else drawn


def _shortened(svg: bytes) -> bytes:
    """Return an SVG that looks the same in half the bytes.

    Coordinates are rounded to a hundredth of a point, and white space that means
    nothing is dropped: a report holds its figures inside.
    """
    return _INDENTED.sub(b"\n", _COORDINATES.sub(_shorter, svg))


def _shorter(attribute: re.Match[bytes]) -> bytes:
    value = _LONG_NUMBER.sub(lambda number: b"%.2f" % float(number[0]), attribute[2])
    return attribute[1] + _AROUND_COMMAND.sub(rb"\1", value).strip() + b'"'


@contextmanager
def writable_folder(directory: Path | str, *, what: str) -> Iterator[Path]:
    """Give a folder, made if it is not there, to write ``what`` into.

    Yields:
        The folder.

    Raises:
        StorageError: If it cannot be written to; the message names ``what``.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise StorageError(
            f"{what} needs a folder that can be written, got {folder}: {error}. Free "
            "some space or name another folder."
        ) from error


def write_table(table: DataFrame, folder: Path, name: str) -> dict[str, Path]:
    """Write a table as CSV and Parquet and return the paths by ending."""
    paths = {ending: folder / f"{name}.{ending}" for ending in ("csv", "parquet")}
    table.to_csv(paths["csv"], index=False)
    table.to_parquet(paths["parquet"], index=False)
    return paths
