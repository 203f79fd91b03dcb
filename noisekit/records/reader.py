"""Many runs, finished or not, as one tidy table each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
import pyarrow as pa

from noisekit.core.errors import NewerFormatError, RunDirectoryError
from noisekit.records.files import read_json, write_json_atomic
from noisekit.records.rundir import Manifest, RunDirectory
from noisekit.records.schema import FORMAT, table
from noisekit.records.segments import newer_format
from noisekit.records.tensors import Array, load_tensors

SET_FILE = "set.json"
_REMEDY = "restore it, or run the recipe again into a new directory"


def write_set(path: Path | str, content: Mapping[str, object]) -> None:
    """Write what a set of runs is, such as its recipe, into the set's directory."""
    write_json_atomic(Path(path) / SET_FILE, {"format": FORMAT, **content})


def read_set(path: Path | str) -> dict[str, object]:
    """Return what ``write_set`` wrote.

    Raises:
        RunDirectoryError: If it is missing or damaged.
        NewerFormatError: If a newer noisekit wrote it.
    """
    file = Path(path) / SET_FILE
    content = read_json(file, remedy=_REMEDY)
    written = content.get("format")
    if not isinstance(written, int):
        raise RunDirectoryError(
            f"{file} needs a format number, got {written!r}; {_REMEDY}."
        )
    if written > FORMAT:
        raise NewerFormatError(newer_format(file, written))
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

    def weights(self, run_id: str, snapshot: str) -> dict[str, Array]:
        """Return the tensors of a snapshot by their names in the model.

        Raises:
            RunDirectoryError: If there is no such run or snapshot, or its file is
                damaged.
        """
        for run in self.directories:
            if run.manifest.run_id == run_id:
                path = run.snapshots / f"{snapshot}.safetensors"
                return load_tensors(path)[0]
        known = ", ".join(run.manifest.run_id for run in self.directories)
        raise RunDirectoryError(
            f"weights needs one of the runs {known}, got {run_id!r}."
        )

    def _gather(self, name: str) -> pd.DataFrame:
        parts = [_joined(run, name, self.faults) for run in self.directories]
        if not parts:
            parts = [_identified(table(name).schema.empty_table(), "", "", 0)]
        frame: pd.DataFrame = pa.concat_tables(parts).to_pandas()
        return frame


def open_runs(where: Path | str | Iterable[Path | str]) -> Runs:
    """Open a set of runs, one run, or several of either.

    A run whose manifest is damaged is left out and named in ``faults``.

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
    if len(paths) == 1 and (paths[0] / SET_FILE).exists():
        content = read_set(paths[0])
        recipe, planned = content.get("recipe"), content.get("runs")
        named = recipe if isinstance(recipe, Mapping) else {}
        if isinstance(planned, list):
            place = {name: number for number, name in enumerate(planned)}
            runs.sort(key=lambda run: place.get(run.manifest.run_id, len(place)))
        return Runs(tuple(runs), named, paths[0], faults)
    return Runs(tuple(runs), faults=faults)


def _runs_in(path: Path, faults: list[str]) -> list[RunDirectory]:
    if (path / "manifest.json").exists():
        return _opened(path, faults)
    children = sorted((path / "runs").glob("*/"))
    return [run for child in children for run in _opened(child, faults)]


def _opened(path: Path, faults: list[str]) -> list[RunDirectory]:
    try:
        return [RunDirectory.open(path)]
    except NewerFormatError:
        raise
    except RunDirectoryError as error:
        faults.append(f"{path.name} is left out: {error}")
        return []


def _joined(run: RunDirectory, name: str, faults: list[str]) -> pa.Table:
    stored = run.read(name)
    manifest = run.manifest
    text = f"{manifest.run_id}: {stored.fault}"
    if stored.fault and text not in faults:
        faults.append(text)
    return _identified(stored.rows, manifest.run_id, manifest.arm, manifest.seed)


def _identified(rows: pa.Table, run_id: str, arm: str, seed: int) -> pa.Table:
    count = rows.num_rows
    for place, (name, value) in enumerate((("run_id", run_id), ("arm", arm))):
        rows = rows.add_column(place, name, pa.array([value] * count, pa.string()))
    return rows.add_column(2, "seed", pa.array([seed] * count, pa.int64()))


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
    return {**manifest.factors, **row, **manifest.costs}
