"""Progress events of a run, and who receives them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["train", "measure", "done", "failed", "diverged", "skipped"]


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One progress event of a run.

    Attributes:
        run_id: The run.
        phase: What it is doing, or how it ended.
        done: Updates taken, or snapshots measured.
        total: How many there will be at most.
        detail: What has just happened, in a few words.
    """

    run_id: str
    phase: Phase
    done: int
    total: int
    detail: str = ""


Progress = Callable[[ProgressEvent], None]


def no_progress(event: ProgressEvent) -> None:
    """Ignore progress events."""


@dataclass(frozen=True, slots=True)
class ProgressReporter:
    """Reports the progress of one run.

    Attributes:
        run_id: The run.
        listener: Receives the events.
    """

    run_id: str
    listener: Progress

    def __call__(self, phase: Phase, done: int, total: int, detail: str = "") -> None:
        """Send one event."""
        self.listener(ProgressEvent(self.run_id, phase, done, total, detail))
