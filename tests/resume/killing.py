"""Kills runs and resumes them, each in a process of its own, forked from this one.

Forked, since importing PyTorch takes longer than a run; nothing has computed before
the fork. Run as ``python -m tests.resume.killing FOLDER [RANDOM] < spec.json``: each of
the runs, one by default, is killed after random times until it gets through.
"""

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from noisekit.records import Manifest, RunDirectory
from noisekit.train.data.datasets import load_data
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.loop import train_run
from noisekit.train.runs.progress import ProgressEvent


def in_child(work: Callable[[], None]) -> int:
    """Fork, do ``work`` in the child and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def exit_of(child: int) -> int:
    """Return how the child ended: 0, or the negative signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(spec: RunSpec, path: Path) -> RunDirectory:
    """Make the run's directory."""
    manifest = Manifest(run_id=spec.run_id, arm=spec.arm, seed=spec.seed)
    return RunDirectory.create(path, manifest)


def go_on(
    spec: RunSpec, path: Path, *, log: Path | None = None, die_at: int = -1
) -> None:
    """Start or resume the run; die at the event of number ``die_at``."""
    seen = 0

    def listen(event: ProgressEvent) -> None:
        nonlocal seen
        if log is not None:
            with log.open("a") as file:
                file.write(f"{event.phase}: {event.detail}\n")
        if seen == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    train_run(spec, RunDirectory.open(path), progress=listen)


def unbroken(spec: RunSpec, folder: Path) -> list[str]:
    """Run without a kill and return the events."""
    path, log = folder / "unbroken", folder / "events.txt"
    start(spec, path)
    assert exit_of(in_child(lambda: go_on(spec, path, log=log))) == 0
    return log.read_text().splitlines()


def killed_at(spec: RunSpec, folder: Path, event: int) -> None:
    """Kill a run at one event, then resume it to the end."""
    path = folder / f"killed-at-{event:03d}"
    start(spec, path)
    assert exit_of(in_child(lambda: go_on(spec, path, die_at=event))) == -signal.SIGKILL
    assert exit_of(in_child(lambda: go_on(spec, path))) == 0


def killed_often(spec: RunSpec, folder: Path, seed: int) -> int:
    """Kill a run after random times until it gets through; return how often."""
    path = folder / f"killed-often-{seed}"
    start(spec, path)
    clock = random.Random(seed)
    for kills in range(1000):
        child = in_child(lambda: go_on(spec, path))
        time.sleep(clock.uniform(0.02, 0.4) * (1 + kills / 10))
        os.kill(child, signal.SIGKILL)
        if exit_of(child) == 0:
            return kills
    raise AssertionError("never got through")


def telling(events: list[str]) -> list[int]:
    """Return the first, a middle and the last event of each kind."""
    kinds: dict[str, list[int]] = {}
    for number, event in enumerate(events):
        kinds.setdefault(re.sub(r"[-+.\de]+$", "", event), []).append(number)
    chosen = {
        same[place]
        for same in kinds.values()
        for place in (0, len(same) // 2, len(same) - 1)
    }
    return sorted(chosen)


def main() -> None:
    """Do all of it and print what was done."""
    folder = Path(sys.argv[1])
    spec = RunSpec.from_json(sys.stdin.read())
    load_data(spec.data)
    # The kernel keeps what a killed process has written: waiting for the disk, which
    # guards against power failures, would be most of a run's time here.
    os.fsync = lambda descriptor: None
    # Building an optimizer imports half of PyTorch; once is enough.
    torch.optim.SGD([torch.zeros(1)])
    events = unbroken(spec, folder)
    chosen = telling(events)
    for event in chosen:
        killed_at(spec, folder, event)
    for seed in range(int(sys.argv[2]) if len(sys.argv) > 2 else 1):
        killed_often(spec, folder, seed)
    print(json.dumps([events[event] for event in chosen]))


if __name__ == "__main__":
    main()
