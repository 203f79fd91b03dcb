"""Sets of runs whose files are harmed at random, and what must hold afterwards.

Whatever is harmed: what is read is right or absent, what is absent is named, the runs
that were not harmed are whole, and following the advice leads to the runs as they
would have been.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from noisekit.core.errors import NoisekitError
from noisekit.records import TABLES, Runs, open_runs
from noisekit.train import load_recipe, resume, run, status
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.runs.progress import ProgressEvent

TINY = Path(__file__).parent / "train" / "tiny.toml"
SETTINGS = {
    "probe.every": "2",
    "snapshots.at.early.updates": "4",
    "measure.everywhere": '["grad_norm"]',
    "measure.examples": '["test"]',
    "compute.checkpoint_updates": "4",
}


def recipe() -> Recipe:
    """Four runs of a few milliseconds, with rows in five of the six tables."""
    return load_recipe(TINY, overrides=SETTINGS)


def finished(folder: Path) -> Path:
    """Return a set whose runs are all complete."""
    run(recipe(), folder, workers=0)
    return folder


def half_finished(folder: Path, *, phase: str, event: int) -> Path:
    """Return a set whose third run was stopped at an event of a phase."""
    seen = 0

    def stop(happened: ProgressEvent) -> None:
        nonlocal seen
        if happened.run_id == "fast-seed0" and happened.phase == phase:
            seen += 1
            if seen == event:
                raise KeyboardInterrupt

    try:
        run(recipe(), folder, workers=0, progress=stop)
    except KeyboardInterrupt:
        return folder
    raise AssertionError("the run was not stopped")


@dataclass(frozen=True)
class Truth:
    """What a set held before it was harmed.

    Attributes:
        rows: Rows of each table and run, as texts, in order.
        runs: What the manifests state, by run.
        weights: Each snapshot's numbers, by run and name.
        states: Each run's status.
    """

    rows: dict[tuple[str, str], list[str]]
    runs: dict[str, str]
    weights: dict[tuple[str, str], np.ndarray]
    states: dict[str, str]


def truth_of(folder: Path) -> Truth:
    """Read all of a set that is whole."""
    runs = open_runs(folder)
    assert runs.faults == []
    names = {
        (item.path.name, path.stem)
        for item in runs.directories
        for path in item.snapshots.glob("*")
    }
    return Truth(
        rows_of(runs),
        facts_of(runs),
        {name: weights_of(runs, *name) for name in names},
        {row.run_id: row.status for row in status(folder)},
    )


def rows_of(runs: Runs) -> dict[tuple[str, str], list[str]]:
    """Return the rows of each table and run as texts, without what tells the time."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, table in TABLES.items():
        frame: pd.DataFrame = getattr(runs, name)
        frame = frame.drop(columns=list(table.timing_columns))
        for run_id, part in frame.groupby("run_id"):
            rows[name, str(run_id)] = part.to_json(orient="records", lines=True).split(
                "\n"
            )
    return rows


def facts_of(runs: Runs) -> dict[str, str]:
    """Return what the manifests state of each run, without what tells the time."""
    facts = {}
    for item in runs.directories:
        known = item.manifest
        costs = {k: v for k, v in known.costs.items() if not k.endswith("seconds")}
        stated = (known.arm, known.seed, known.status, known.reason, known.factors)
        facts[known.run_id] = json.dumps([*stated, known.recipe, known.data, costs])
    return facts


def weights_of(runs: Runs, run_id: str, snapshot: str) -> np.ndarray:
    """Return a snapshot's numbers in one vector."""
    tensors = runs.weights(run_id, snapshot)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def flip(path: Path, dice: random.Random, folder: Path) -> list[Path]:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(data))
    return [path]


def cut(path: Path, dice: random.Random, folder: Path) -> list[Path]:
    """Cut the file short."""
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))] if data else b"")
    return [path]


def delete(path: Path, dice: random.Random, folder: Path) -> list[Path]:
    """Remove the file."""
    path.unlink()
    return [path]


def swap(path: Path, dice: random.Random, folder: Path) -> list[Path]:
    """Exchange the contents of two files of a kind, of any runs."""
    kind = [item for item in files_of(folder) if item.suffix == path.suffix]
    other = dice.choice(kind)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return [path, other] if mine != theirs else []


HARMS: tuple[Callable[[Path, random.Random, Path], list[Path]], ...] = (
    flip,
    cut,
    delete,
    swap,
)


def files_of(folder: Path) -> list[Path]:
    """Return every file of a set but locks, whose content means nothing."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.name != "lock")


def harm(folder: Path, seed: int) -> tuple[str, set[str]]:
    """Harm one file at random; return what was done, and whose files were harmed."""
    dice = random.Random(seed)
    how = HARMS[seed % len(HARMS)]
    # By directory first: a set has one set.json and many segments.
    groups: dict[str, list[Path]] = {}
    for path in files_of(folder):
        groups.setdefault(f"{path.parent.name[:4]}{path.suffix}", []).append(path)
    path = dice.choice(groups[dice.choice(sorted(groups))])
    harmed = how(path, dice, folder)
    runs = {
        item.relative_to(folder).parts[1] if item.parent != folder else "set.json"
        for item in harmed
    }
    return f"{how.__name__} {path.relative_to(folder)}", runs


def check_reading(folder: Path, truth: Truth, harmed: set[str]) -> None:
    """What is read is right or absent and named; the other runs are whole."""
    runs = open_runs(folder)
    rows, facts = rows_of(runs), facts_of(runs)
    refused: list[str] = []
    for (run_id, name), numbers in truth.weights.items():
        try:
            found = weights_of(runs, run_id, name)
        except NoisekitError as error:
            refused.append(f"{run_id}: {error}")
            continue
        assert np.array_equal(found, numbers), (run_id, name)
    assert runs.recipe in ({}, recipe().model_dump(mode="json"))
    assert facts.items() <= truth.runs.items()
    for key, found_rows in rows.items():
        # Rows of a run that goes on end where it was harmed; none is changed.
        assert found_rows[:-1] == truth.rows[key][: len(found_rows) - 1], key
    assert {text.partition(":")[0] for text in refused} <= harmed
    named = " ".join([*runs.faults, *refused])
    for key, true_rows in truth.rows.items():
        whole = rows.get(key) == true_rows
        assert whole or key[1] in harmed, key
        assert whole or key[1] in named or truth.states[key[1]] != "done", key
    assert set(truth.runs) - set(facts) <= harmed
    if "set.json" in harmed:
        assert "set.json" in named or runs.recipe


def check_status(folder: Path, truth: Truth, harmed: set[str]) -> None:
    """Every run is listed, and those that were not harmed as they are."""
    states = {row.run_id: row.status for row in status(folder)}
    assert states.keys() == truth.states.keys()
    for run_id, state in states.items():
        assert run_id in harmed or state == truth.states[run_id]


def check_way_out(folder: Path, truth: Truth, harmed: set[str]) -> bool:
    """Follow the advice until the set is complete; return whether there was any.

    Args:
        folder: The set.
        truth: Of the finished set.
        harmed: Runs whose files were harmed.
    """
    advice = _advice(lambda: resume(folder, workers=0))
    if "delete the run's directory and resume" in advice:
        advised = [name for name in harmed if f"{name}: " in advice]
        assert advised, advice
        for name in advised:
            shutil.rmtree(folder / "runs" / name)
        resume(folder, workers=0)
    elif "run the same recipe again with --out and this directory" in advice:
        assert "set.json" in harmed
        advice = _advice(lambda: run(recipe(), folder, workers=0)) or advice
        # Both were harmed: the file of the set, and that of a run.
        for name in harmed - {"set.json"} if "runs failed" in advice else ():
            shutil.rmtree(folder / "runs" / name)
            resume(folder, workers=0)
    else:
        assert not advice
    runs = open_runs(folder)
    for run_id, name in truth.weights:
        # Bits of weights are looked at when they are loaded.
        refused = _advice(lambda id=run_id, name=name: runs.weights(id, name))
        if refused:
            advice += refused
            assert run_id in harmed
            assert "delete the run's directory and resume" in refused
            shutil.rmtree(folder / "runs" / run_id, ignore_errors=True)
    resume(folder, workers=0)
    runs = open_runs(folder)
    assert rows_of(runs) == truth.rows
    for (run_id, name), numbers in truth.weights.items():
        assert np.array_equal(weights_of(runs, run_id, name), numbers), (run_id, name)
    assert {row.status for row in status(folder)} == {"done"}
    return bool(advice)


def _advice(work: Callable[[], object]) -> str:
    """Return what an error says, empty where there is none."""
    try:
        work()
    except NoisekitError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Bases:
    """Whole sets to be copied and harmed, with what is true of each.

    Attributes:
        folders: A finished set, one stopped in training, one stopped in measuring.
        truths: Of each.
    """

    folders: tuple[Path, ...]
    truths: tuple[Truth, ...]

    @classmethod
    def make(cls, place: Path) -> "Bases":
        """Make the three sets."""
        folders = (
            finished(place / "finished"),
            half_finished(place / "training", phase="train", event=7),
            half_finished(place / "measuring", phase="measure", event=3),
        )
        return cls(folders, tuple(map(truth_of, folders)))

    def check(self, seed: int, folder: Path, *, way_out: bool) -> str:
        """Harm a copy and check all that must hold; return how it ended."""
        number = seed // len(HARMS) % len(self.folders)
        shutil.copytree(self.folders[number], folder)
        what, harmed = harm(folder, seed)
        try:
            check_reading(folder, self.truths[number], harmed)
            check_status(folder, self.truths[number], harmed)
            needed = way_out and check_way_out(folder, self.truths[0], harmed)
        except Exception as error:
            raise AssertionError(f"case {seed}, set {number}: {what}") from error
        return "advice followed" if needed else "no advice needed"
