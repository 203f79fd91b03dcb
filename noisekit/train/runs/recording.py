"""The tables that training fills, and the sink that a probe's readings go into."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from torch import Tensor

from noisekit.probes import Reading
from noisekit.records import RunDirectory, TableWriter
from noisekit.records.writer import Cell

_MAX_PENDING = 64
"""Readings that are kept on the device before they come over as numbers."""


class Recorder:
    """Writes what happens while a run trains.

    A reading lacks epoch, rate and loss: ``expect`` states them before the optimizer
    steps. Readings stay on the device until there are some to transfer.
    """

    def __init__(
        self,
        run: RunDirectory,
        num_rows: Mapping[str, int],
        *,
        layers: bool,
        series: bool = False,
    ) -> None:
        self._layers = layers
        self._expected: tuple[float, float, Tensor] | None = None
        self._pending: list[tuple[Reading, float, float, Tensor]] = []
        self._writers: dict[str, TableWriter] = {}
        tables = ["steps", "evaluations", "snapshots"]
        tables += ["layers"] if layers else []
        tables += ["measurements"] if series else []
        try:
            for name in tables:
                first = num_rows.get(name, 0)
                self._writers[name] = run.writer(name, first_row=first)
        except BaseException:
            self.close()
            raise

    def append(self, table: str, row: Mapping[str, Cell]) -> None:
        """Add a row to ``table``."""
        self._writers[table].append(row)

    def expect(self, *, epoch: float, learning_rate: float, batch_loss: Tensor) -> None:
        """State the epoch, rate and batch loss of the next reading."""
        self._expected = (epoch, learning_rate, batch_loss)

    def record(self, reading: Reading) -> None:
        """Take one reading; this is the probe's sink."""
        assert self._expected is not None
        self._pending.append((reading, *self._expected))
        if len(self._pending) >= _MAX_PENDING:
            self._write_readings()

    def _write_readings(self) -> None:
        for reading, epoch, learning_rate, batch_loss in self._pending:
            own = {
                "epoch": epoch,
                "learning_rate": learning_rate,
                "batch_loss": batch_loss.item(),
            }
            self.append("steps", {**reading.row(), **own})
            for layer in reading.layers if self._layers else ():
                self.append(
                    "layers",
                    {
                        "step": reading.step,
                        "layer": layer.name,
                        "grad_sq_norm": layer.grad_sq_norm.value,
                        "variance_trace": layer.variance_trace.value,
                    },
                )
        self._pending.clear()

    def flush(self) -> dict[str, int]:
        """Make all rows durable and return how many each table has."""
        self._write_readings()
        return {
            name: writer.flush(durable=True) for name, writer in self._writers.items()
        }

    def close(self) -> None:
        """Close the files; what was not flushed is not written."""
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> Self:
        """Return the recorder itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; a checkpoint has flushed what counts."""
        self.close()
