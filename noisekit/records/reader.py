"""Many runs, finished or not, as one tidy table each."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from noisekit.core.arguments import checked
from noisekit.core.errors import NewerFormatError, RunDirectoryError
from noisekit.records.files import plain, read_json, write_json_atomic
from noisekit.records.integrity import check_object, signed
from noisekit.records.manifest import Manifest
from noisekit.records.rundir import RunDirectory
from noisekit.records.schema import FORMAT, table
from noisekit.records.stored_table import conform, joined
from noisekit.records.tensors import Array

SET_FILE = "set.json"
_IDENTITY = {"run_id": pa.string(), "arm": pa.string(), "seed": pa.int64()}
"""Columns in front of each table."""
RUN_COLUMNS = frozenset(
    {"run_id", "arm", "seed", "status", "reason", "created", "updated"}
    | {"updates", "examples_seen", "train_seconds", "measure_seconds"}
    | {"num_matvecs", "num_grads"}
)
"""Columns of ``Runs.runs`` beside the factors, which have other names."""
_REMEDY = (
    "restore it, or run the same recipe again with --out and this directory, which "
    "keeps its runs"
)


def write_set(path: Path | str, content: Mapping[str, object]) -> None:
    """Write what a set of runs is, such as its recipe, into the set's directory."""
    plain_content = plain({**content, "format": FORMAT})
    assert isinstance(plain_content, dict)
    write_json_atomic(Path(path) / SET_FILE, signed(plain_content))


def read_set(path: Path | str) -> dict[str, object]:
    """Return what ``write_set`` wrote.

    Raises:
        RunDirectoryError: If it is missing, damaged or altered.
        NewerFormatError: If a newer noisekit wrote it.
    """
    file = Path(path) / SET_FILE
    content = read_json(file, remedy=_REMEDY)
    written = content.get("format")
    if not isinstance(written, int):
        raise RunDirectoryError(
            f"{file} needs a format number, got {written!r}; {_REMEDY}."
        )
    check_object(file, content, remedy=_REMEDY)
    if "run_id" in content:
        raise RunDirectoryError(
            f"{file} needs to describe a set of runs, got the manifest of run "
            f"{content['run_id']!r}; {_REMEDY}."
        )
    return content


@dataclass(frozen=True)
class Runs:
    """Many runs, read when a table is first asked for.

    A run that goes on is read as far as it got. Each table has the columns
    ``run_id``, ``arm`` and ``seed`` in front; ``runs`` has the factors as well.

    Attributes:
        directories: One per run that could be read.
        recipe: The recipe of the set, empty where the runs belong to none.
        set_dir: The set's directory, ``None`` where runs were named one by one.
        faults: What could not be read or should not be trusted, in words.
    """

    directories: tuple[RunDirectory, ...]
    recipe: Mapping[str, object] = field(default_factory=dict)
    set_dir: Path | None = None
    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.directories)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run, with its status, its costs and what the arms differ in."""
        return pd.DataFrame([_run_row(run.manifest) for run in self.directories])

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Readings of single updates."""
        return self._gather("steps")

    @cached_property
    def layers(self) -> pd.DataFrame:
        """Readings of single updates, by layer."""
        return self._gather("layers")

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """Losses and errors over the whole data."""
        return self._gather("evaluations")

    @cached_property
    def snapshots(self) -> pd.DataFrame:
        """Where each snapshot was taken, and how well the model did there."""
        return self._gather("snapshots")

    @cached_property
    def measurements(self) -> pd.DataFrame:
        """What was measured at the snapshots, one row per quantity."""
        return self._gather("measurements")

    @cached_property
    def examples(self) -> pd.DataFrame:
        """Outcome of each example at the snapshots."""
        return self._gather("examples")

    @checked
    def weights(self, run_id: str, snapshot: str) -> dict[str, Array]:
        """Return the tensors of a snapshot by their names in the model.

        Raises:
            RunDirectoryError: If there is no such run or snapshot, or its file is
                missing, damaged, or not the one that the run wrote.
        """
        for run in self.directories:
            if run.manifest.run_id == run_id:
                return run.load_snapshot(snapshot)
        known = ", ".join(run.manifest.run_id for run in self.directories)
        raise RunDirectoryError(
            f"weights needs one of the runs {known}, got {run_id!r}."
        )

    def _gather(self, name: str) -> pd.DataFrame:
        identified = [_identified(run, name, self.faults) for run in self.directories]
        rows = joined([part for part, _ in identified] or [pa.table({})])
        rows = conform(rows, table(name))
        counts = [part.num_rows for part, _ in identified]
        for place, (column, kind) in enumerate(_IDENTITY.items()):
            values = pa.array([getattr(run, column) for _, run in identified], kind)
            rows = rows.add_column(place, column, values.take(_places(counts)))
        frame: pd.DataFrame = rows.to_pandas()
        return frame


@checked
def open_runs(
    where: Path | str | Iterable[Path | str], *, verify_weights: bool = False
) -> Runs:
    """Open a set of runs, one run, or several of either.

    A run whose manifest cannot be trusted is left out, and named in ``faults`` as is
    every file that is missing or not as it was written.

    Args:
        where: A set's directory, a run's, or several of either.
        verify_weights: Also read all snapshots and compare the weights with their
            checksums, at the cost of reading these files whole. Otherwise weights are
            verified when they are loaded, and only their headers here.

    Raises:
        RunDirectoryError: If there is no run.
    """
    places = [where] if isinstance(where, Path | str) else list(where)
    paths = [Path(place) for place in places]
    faults: list[str] = []
    runs = [run for path in paths for run in _runs_in(path, faults)]
    if not runs:
        listed = ", ".join(map(str, paths)) or "nothing"
        wrong = f" ({'; '.join(faults)})" if faults else ""
        raise RunDirectoryError(
            f"needs a directory that noisekit run or nk.attach wrote, got {listed}"
            f"{wrong}; give the directory that has set.json or manifest.json."
        )
    for run in runs:
        faults += [f"{run.manifest.run_id}: {text}" for text in run.manifest.faults]
        damage = run.damage(weights=verify_weights)
        faults += [f"{run.manifest.run_id}: {text}" for text in damage]
    faults += [*_unverified(runs), *_changed_origins(runs)]
    if len(paths) == 1 and (paths[0] / "runs").is_dir():
        return Runs(*_in_order(paths[0], runs, faults), paths[0], faults)
    return Runs(tuple(runs), faults=faults)


def _in_order(
    path: Path, runs: list[RunDirectory], faults: list[str]
) -> tuple[tuple[RunDirectory, ...], Mapping[str, object]]:
    """Return runs in the order of their set, and its recipe, as far as it is known."""
    try:
        content = read_set(path)
    except NewerFormatError:
        raise
    except RunDirectoryError as error:
        faults.append(f"the recipe of the set is not known: {error}")
        return tuple(runs), {}
    recipe, planned = content.get("recipe"), content.get("runs")
    if isinstance(planned, list):
        place = {name: number for number, name in enumerate(planned)}
        runs.sort(key=lambda run: place.get(run.manifest.run_id, len(place)))
        lost = [name for name in planned if not (path / "runs" / str(name)).is_dir()]
        faults += [f"{name} is missing: its directory is not there" for name in lost]
    return tuple(runs), recipe if isinstance(recipe, Mapping) else {}


def _unverified(runs: Iterable[RunDirectory]) -> list[str]:
    names = [run.manifest.run_id for run in runs if not run.verified]
    if not names:
        return []
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [
        f"{len(names)} runs are unverified ({listed}): they were recorded before files "
        "had digests, so that damage to them would not be noticed"
    ]


def _changed_origins(runs: Iterable[RunDirectory]) -> Iterator[str]:
    """Yield the runs that began with another run's snapshot as it is no more."""
    by_place = {run.path.resolve(): run for run in runs}
    for path, run in by_place.items():
        origin = run.manifest.origin
        other = by_place.get(path.parent / origin.get("run_id", ""))
        if not origin or other is None or other.manifest.digests is None:
            continue
        name = origin.get("snapshot")
        for folder, key in (
            ("snapshots", "sha256"),
            ("optimizers", "optimizer_sha256"),
        ):
            now = other.manifest.digests.get(f"{folder}/{name}.safetensors")
            if key in origin and origin[key] != now:
                yield (
                    f"{run.manifest.run_id} began with {folder}/{name} of "
                    f"{origin['run_id']}, which has changed since"
                )


def _runs_in(path: Path, faults: list[str]) -> list[RunDirectory]:
    if (path / "manifest.json").exists():
        return _opened(path, faults)
    children = sorted((path / "runs").glob("*/"))
    runs = [run for child in children for run in _opened(child, faults)]
    return [run for run in runs if not _is_copy(run, faults)]


def _is_copy(run: RunDirectory, faults: list[str]) -> bool:
    """Whether a directory of a set holds a run of another name, such as a backup."""
    if run.manifest.run_id == run.path.name:
        return False
    faults.append(
        f"{run.path.name} is left out: it holds the run {run.manifest.run_id}, whose "
        f"place is runs/{run.manifest.run_id}; move a copy out of the set"
    )
    return True


def _opened(path: Path, faults: list[str]) -> list[RunDirectory]:
    try:
        return [RunDirectory.open(path)]
    except RunDirectoryError as error:
        faults.append(f"{path.name} is left out: {error}")
        return []


def _identified(
    run: RunDirectory, name: str, faults: list[str]
) -> tuple[pa.Table, Manifest]:
    """Return the rows of a run's table with the run that they belong to."""
    stored = run.read(name)
    text = f"{run.manifest.run_id}: {stored.fault}"
    if stored.fault and text not in faults:
        faults.append(text)
    return stored.sparse, run.manifest


def _places(counts: list[int]) -> pa.Array:
    """Return for each row of tables below each other the number of its table."""
    return pa.array(np.repeat(np.arange(len(counts)), counts))


def _run_row(manifest: Manifest) -> dict[str, object]:
    row: dict[str, object] = {
        "run_id": manifest.run_id,
        "arm": manifest.arm,
        "seed": manifest.seed,
        "status": manifest.status.value,
        "reason": manifest.reason,
        "created": manifest.created,
        "updated": manifest.updated,
    }
    factors = {name: factor_cell(value) for name, value in manifest.factors.items()}
    return {**factors, **row, **manifest.costs}


def factor_cell(value: object) -> object:
    """Return a factor as a cell of ``Runs.runs``.

    A list or a table becomes text, which can be compared and grouped.
    """
    return json.dumps(value) if isinstance(value, list | dict) else value
