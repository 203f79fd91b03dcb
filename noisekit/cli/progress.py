"""One progress display for a whole sweep."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from noisekit.cli.terminal import cell
from noisekit.core.text import printable
from noisekit.train.runs.progress import ProgressEvent

_ENDED = frozenset({"done", "failed", "diverged", "skipped"})
_LINE_EVERY_SECONDS = 10.0


class SweepProgress:
    """Shows runs done, what each worker does, and the time left.

    On a terminal it draws bars; elsewhere it prints a line now and then, so that a
    log file stays readable. It is the ``progress`` callback of ``nk.run``.
    """

    def __init__(self, num_runs: int) -> None:
        self._live = sys.stderr.isatty()
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._console = console
        self._active: dict[str, TaskID] = {}
        self._share: dict[str, float] = {}
        self._ended: dict[str, str] = {}
        self._num_runs = num_runs
        self._overall = self._bars.add_task("all runs", total=num_runs, phase="")
        self._started = time.monotonic()
        self._last_line = self._started

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()
        if kind is None:
            self._print_line()

    def __call__(self, event: ProgressEvent) -> None:
        """Take one event of one run."""
        if event.phase in _ENDED:
            self._end(event)
        else:
            self._advance(event)
        self._bars.update(self._overall, completed=len(self._ended))
        now = time.monotonic()
        if not self._live and now - self._last_line > _LINE_EVERY_SECONDS:
            self._last_line = now
            self._print_line()

    def _advance(self, event: ProgressEvent) -> None:
        if event.run_id not in self._active:
            self._active[event.run_id] = self._bars.add_task(
                printable(event.run_id), total=event.total, phase=event.phase
            )
        self._bars.update(
            self._active[event.run_id],
            completed=event.done,
            total=event.total,
            phase=printable(f"{event.phase} {event.detail}".strip()),
        )
        # Training is taken as the first half of a run, measuring as the second.
        part = event.done / max(event.total, 1) / 2
        self._share[event.run_id] = part + (0.5 if event.phase == "measure" else 0.0)

    def _end(self, event: ProgressEvent) -> None:
        self._ended[event.run_id] = event.phase
        self._share.pop(event.run_id, None)
        task = self._active.pop(event.run_id, None)
        if task is not None:
            self._bars.remove_task(task)
        if event.phase != "done":
            self._console.print(cell(f"{event.run_id}: {event.phase}. {event.detail}"))

    def _print_line(self) -> None:
        elapsed = time.monotonic() - self._started
        finished = len(self._ended) + sum(self._share.values())
        line = f"{len(self._ended)}/{self._num_runs} runs, {elapsed:.0f} s"
        if 0 < finished < self._num_runs:
            left = elapsed * (self._num_runs - finished) / finished
            line += f", about {left:.0f} s left"
        self._console.print(line, highlight=False)
