"""Execute runs: in this process, or in a pool of spawned ones.

A worker that dies takes only its own run with it: each has a pipe of its own to the
parent, so that the parent knows whose run it was.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from noisekit.core.errors import NoisekitError, RunFailedError, RunLockedError
from noisekit.core.references import allow_code
from noisekit.core.worker_process import run_while_parent_lives
from noisekit.records import Manifest, RunDirectory, RunStatus
from noisekit.train.runs.loop import train_run
from noisekit.train.runs.progress import Progress, ProgressEvent, no_progress
from noisekit.train.sweeps.job_queue import Job, JobOutcome, JobQueue

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_EVENT_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_READY = "ready"


def execute(job: Job, *, progress: Progress = no_progress) -> JobOutcome:
    """Start or resume one run in this process; an error becomes a failed outcome."""
    spec = job.spec
    told: set[str] = set()

    def report(event: ProgressEvent) -> None:
        told.add(event.phase)
        progress(event)

    try:
        with allow_code(job.allow_code):
            run = RunDirectory.open(job.path, run_id=spec.run_id)
            outcome = train_run(spec, run, progress=report)
    except Exception as error:  # whatever it is, the other runs go on
        failed = _failed(job, _reason(error), error=error)
        if "failed" not in told:
            progress(_failure_event(failed))
        return failed
    return JobOutcome(spec.run_id, outcome.status, outcome.reason)


def execute_here(
    jobs: Sequence[Job], *, progress: Progress = no_progress
) -> list[JobOutcome]:
    """Execute runs one after the other in this process."""
    queue, outcomes = JobQueue(jobs), list[JobOutcome]()
    while (job := queue.take()) is not None:
        outcomes += _ended(queue, execute(job, progress=progress), progress)
    return outcomes


def execute_in_processes(
    jobs: Sequence[Job], *, workers: int, threads: int, progress: Progress = no_progress
) -> list[JobOutcome]:
    """Execute runs in spawned processes, at most ``workers`` at the same time.

    Args:
        jobs: The runs; one that starts from another begins once that is complete.
        workers: Most processes at the same time.
        threads: Threads of each process, set before its libraries are loaded.
        progress: Called in this process, with the events of all runs.
    """
    queue = JobQueue(jobs)
    outcomes: list[JobOutcome] = []
    pool: list[_Worker] = []
    try:
        with _thread_variables(threads):
            while queue or any(worker.job for worker in pool):
                busy = sum(worker.job is not None for worker in pool)
                while len(pool) < min(workers, busy + queue.num_ready):
                    pool.append(_Worker())
                for worker in pool:
                    if worker.job is None and (job := queue.take()) is not None:
                        worker.give(job)
                for outcome in _heard(pool, progress):
                    outcomes += _ended(queue, outcome, progress)
                pool = [worker for worker in pool if worker.alive]
    finally:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.stop()
    return outcomes


def _ended(
    queue: JobQueue, outcome: JobOutcome, progress: Progress
) -> list[JobOutcome]:
    """Return an outcome, and those of the runs that can no longer run after it."""
    outcomes = [outcome]
    for job, reason in queue.end(outcome):
        outcomes.append(_failed(job, reason))
        progress(_failure_event(outcomes[-1]))
    return outcomes


class _Worker:
    """A spawned process that executes one run at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=run_while_parent_lives,
            args=(f"{__name__}:_work", theirs),
            daemon=True,
        )
        # Inherited: Ctrl-C reaches the whole group, and must not end a worker that is
        # still importing with a traceback. The parent ends it.
        resource_tracker.ensure_running()  # which would unblock it, once
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # Kept open here, it would hide that the process has died.
        theirs.close()
        self.job: Job | None = None
        self.alive = True
        self._ready = False

    def give(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # it has died: _heard finds out and says so
            self.connection.send(job)

    def receive(self, progress: Progress) -> JobOutcome | None:
        """Take one message; an outcome if the run has ended."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return self._died(progress)
        if isinstance(message, ProgressEvent):
            progress(message)
        elif isinstance(message, JobOutcome):
            self.job = None
            return message
        else:
            self._ready = True
        return None

    def stop(self) -> None:
        """End the process; a run that it is at can be resumed."""
        self.process.terminate()
        self.process.join(_GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()

    def _died(self, progress: Progress) -> JobOutcome | None:
        self.process.join()
        self.alive = False
        code = self.process.exitcode or 0
        if not self._ready:
            raise RunFailedError(
                f"a worker process ended with exit code {code} before it could take a "
                "run. A script that calls nk.run needs its own work under "
                "`if __name__ == '__main__':`, since workers import it; or use "
                "workers=0 to stay in one process."
            )
        if self.job is None:
            return None
        outcome = _failed(self.job, _how_it_died(code))
        self.job = None
        progress(_failure_event(outcome))
        return outcome


def _heard(pool: Sequence[_Worker], progress: Progress) -> list[JobOutcome]:
    """Wait for messages, and return the outcomes among them."""
    ready = wait([worker.connection for worker in pool])
    speaking = [worker for worker in pool if worker.connection in ready]
    outcomes = [worker.receive(progress) for worker in speaking]
    return [outcome for outcome in outcomes if outcome is not None]


def _how_it_died(code: int) -> str:
    if code >= 0:
        return f"its worker process ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
    return f"its worker process was killed by {name}{hint}"


def _work(connection: Connection) -> None:
    """Be a worker: execute what comes through the pipe until the parent is gone."""
    connection.send(_READY)
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        connection.send(execute(job, progress=_Throttle(connection)))


class _Throttle:
    """Sends events to the parent, but no more than a person can follow."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._phase = ""
        self._sent = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        if event.phase == self._phase and now - self._sent < _EVENT_SECONDS:
            return
        self._phase, self._sent = event.phase, now
        self._connection.send(event)


def _failure_event(outcome: JobOutcome) -> ProgressEvent:
    return ProgressEvent(outcome.run_id, "failed", 0, 1, outcome.reason)


def _failed(job: Job, reason: str, *, error: Exception | None = None) -> JobOutcome:
    """Put on record that a run failed, as far as its directory can be written."""
    if not isinstance(error, RunLockedError):
        with suppress(NoisekitError, OSError):
            directory = RunDirectory.open(job.path, run_id=job.spec.run_id)
            with directory.lock():
                _write_failure(directory, reason, error)
    return JobOutcome(job.spec.run_id, RunStatus.FAILED, reason)


def _write_failure(
    directory: RunDirectory, reason: str, error: Exception | None
) -> None:
    manifest: Manifest = directory.manifest
    if manifest.status.complete:
        return
    failed = replace(manifest, status=RunStatus.FAILED, reason=reason)
    directory.write_manifest(failed)
    if error is not None:
        text = "".join(traceback.format_exception(error))
        (directory.path / "error.txt").write_text(text, encoding="utf-8")


def _reason(error: Exception) -> str:
    """Return an error's own words; what is not ours is named by its class as well."""
    text = str(error)
    return (
        text if isinstance(error, NoisekitError) else f"{type(error).__name__}: {text}"
    )


@contextmanager
def _thread_variables(threads: int) -> Iterator[None]:
    """Let processes that start meanwhile have ``threads`` threads from the start."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
