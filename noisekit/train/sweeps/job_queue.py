"""Runs to execute in an order in which each finds the runs that it needs complete."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from noisekit.records import RunStatus
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.section import run_id_of


@dataclass(frozen=True, slots=True)
class Job:
    """One run to execute.

    Attributes:
        spec: Its description.
        path: Its directory.
        allow_code: Whether code that the description names may be imported.
    """

    spec: RunSpec
    path: Path
    allow_code: bool = False

    @property
    def needs(self) -> str | None:
        """The run that this one starts from, which has to be complete before."""
        start = self.spec.start
        return None if start is None else run_id_of(start.arm, self.spec.seed)


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a run ended, such as ``done`` or ``failed``, and why."""

    run_id: str
    status: RunStatus
    reason: str = ""


class JobQueue:
    """Jobs that wait, each until the run that it needs has ended.

    A run begins once the run that it starts from is complete, not before: only then
    have the files that it reads digests. What is not in the queue counts as complete.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._waiting = list(jobs)
        self._unfinished = {job.spec.run_id for job in self._waiting}

    def __len__(self) -> int:
        """Return how many jobs wait, ready or not."""
        return len(self._waiting)

    @property
    def num_ready(self) -> int:
        """Number of jobs that could begin now."""
        return sum(map(self._ready, self._waiting))

    def take(self) -> Job | None:
        """Remove and return the first job that could begin now, if there is one."""
        for place, job in enumerate(self._waiting):
            if self._ready(job):
                return self._waiting.pop(place)
        return None

    def end(self, outcome: JobOutcome) -> list[tuple[Job, str]]:
        """Note how a run ended; return the jobs that cannot run now, and why.

        Without a complete run to start from, those that need it fail, and those that
        need these. A run that diverged is complete: what starts from one of its
        snapshots runs, or is skipped where the snapshot was never taken.
        """
        self._unfinished.discard(outcome.run_id)
        if outcome.status is not RunStatus.FAILED:
            return []
        stuck = [job for job in self._waiting if job.needs == outcome.run_id]
        self._waiting = [job for job in self._waiting if job.needs != outcome.run_id]
        reason = f"run {outcome.run_id}, which it starts from, failed: {outcome.reason}"
        failed = [(job, reason) for job in stuck]
        for job in stuck:
            own = JobOutcome(job.spec.run_id, RunStatus.FAILED, outcome.reason)
            failed += self.end(own)
        return failed

    def _ready(self, job: Job) -> bool:
        return job.needs not in self._unfinished
