"""Kills sweeps of runs that start one from the other, and resumes them.

Each in a process of its own, forked from this one. Run as
``python -m tests.resume.killing_sweeps FOLDER RECIPE EVERY``.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from noisekit.train.data.datasets import load_data
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.sweeps import sweep
from tests.resume.killing import exit_of, in_child


def sweeping(
    recipe: Recipe, path: Path, *, log: Path | None = None, die_at: int = -1
) -> Callable[[], None]:
    """Return what runs the whole sweep, or what is left; it dies at one event."""

    def work() -> None:
        seen = 0

        def listen(event: ProgressEvent) -> None:
            nonlocal seen
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{event.run_id} {event.phase}: {event.detail}\n")
            if seen == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        sweep.run(recipe, path, workers=0, progress=listen)

    return work


def killed_at(recipe: Recipe, path: Path, event: int) -> None:
    """Kill a sweep at one event, then run it again to the end."""
    first = in_child(sweeping(recipe, path, die_at=event))
    assert exit_of(first) == -signal.SIGKILL
    assert exit_of(in_child(sweeping(recipe, path))) == 0


def killed_often(recipe: Recipe, path: Path, seed: int) -> int:
    """Kill a sweep after random times until it gets through; return how often."""
    clock = random.Random(seed)
    for kills in range(1000):
        child = in_child(sweeping(recipe, path))
        time.sleep(clock.uniform(0.02, 0.6) * (1 + kills / 10))
        os.kill(child, signal.SIGKILL)
        if exit_of(child) == 0:
            return kills
    raise AssertionError("never got through")


def main() -> None:
    """Do all of it and print the moments."""
    folder, every = Path(sys.argv[1]), int(sys.argv[3])
    recipe = load_recipe(sys.argv[2])
    load_data(recipe.data)
    # The kernel keeps what a killed process has written, as in killing.py.
    os.fsync = lambda descriptor: None
    torch.optim.SGD([torch.zeros(1)])
    log = folder / "events.txt"
    whole = in_child(sweeping(recipe, folder / "unbroken", log=log))
    assert exit_of(whole) == 0
    events = log.read_text().splitlines()
    saved = [i for i, event in enumerate(events) if "checkpoint saved" in event]
    chosen = sorted({*range(0, len(events), every), *saved})
    for event in chosen:
        killed_at(recipe, folder / f"killed-at-{event:03d}", event)
    killed_often(recipe, folder / "killed-often", seed=0)
    print(json.dumps([events[event] for event in chosen]))


if __name__ == "__main__":
    main()
