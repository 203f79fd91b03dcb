"""Readings as text for other tools: comma-separated values and JSON lines."""

import csv
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Self

from noisekit.core.errors import StorageError
from noisekit.records.sink import HasRow
from noisekit.records.writer import Cell


class TextSink(ABC):
    """Appends one line per reading; each is in the file when the call returns.

    A file that is there already is continued; a last line that a killed process has
    left unfinished is dropped. Text has no types and no run status: to analyse runs
    with noisekit, record them in a run directory.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path | str) -> None:
        """Open or make the file.

        Raises:
            StorageError: If the file cannot be opened.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8", newline="")
        except OSError as error:
            raise StorageError(
                f"a sink needs a file that it can write, got {self.path}: "
                f"{error.strerror}; name another file."
            ) from error
        _drop_unfinished_line(self.path)

    def __call__(self, reading: HasRow) -> None:
        """Write one reading.

        Raises:
            StorageError: If the line cannot be written.
        """
        line = self._line(dict(reading.row()))
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self.path} could not be written: {error.strerror}; the lines "
                "before are still there. Free some space, or detach the probe."
            ) from error

    @abstractmethod
    def _line(self, row: dict[str, Cell]) -> str:
        """Return the row as whole lines."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return the sink itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()


class CsvSink(TextSink):
    """Writes readings as comma-separated values, with a header."""

    def __init__(self, path: Path | str) -> None:
        """Open or make the file; its columns are those of the first row.

        Raises:
            StorageError: If the file cannot be opened.
        """
        super().__init__(path)
        self._file.seek(0)
        header = next(csv.reader([self._file.readline()]), [])
        self._columns: tuple[str, ...] = tuple(header)
        self._file.seek(0, os.SEEK_END)

    def _line(self, row: dict[str, Cell]) -> str:
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self._columns:
            self._columns = tuple(row)
            writer.writerow(self._columns)
        unknown = [name for name in row if name not in self._columns]
        if unknown:
            raise StorageError(
                f"{self.path} needs the columns that it began with, got also "
                f"{', '.join(unknown)}; write to another file, or use JSON lines, "
                "where rows may differ."
            )
        writer.writerow([row.get(name) for name in self._columns])
        return text.getvalue()


class JsonLinesSink(TextSink):
    """Writes each reading as one JSON object; what is no number is ``null``."""

    def _line(self, row: dict[str, Cell]) -> str:
        finite = {
            name: None if isinstance(cell, float) and not math.isfinite(cell) else cell
            for name, cell in row.items()
        }
        return json.dumps(finite, allow_nan=False) + "\n"


TEXT_SINKS: Mapping[str, Callable[[Path | str], TextSink]] = MappingProxyType(
    {".csv": CsvSink, ".jsonl": JsonLinesSink}
)
"""Sinks by the ending of their files' names."""


def _drop_unfinished_line(path: Path) -> None:
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
