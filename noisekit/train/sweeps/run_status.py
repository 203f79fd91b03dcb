"""What a set of runs was made from, and how far its runs are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from noisekit.core.errors import RecipeError, RunDirectoryError
from noisekit.records import RunDirectory, RunStatus, read_set
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.tables import Table
from noisekit.train.section import run_id_of


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far one run is.

    Attributes:
        run_id: The run.
        status: As in its manifest, or ``missing``, ``damaged``, ``interrupted``, or
            ``waiting`` for the run that it starts from.
        updates: Updates up to its last evaluation, or its last reading.
        max_updates: Most updates that it may take; ``None`` where no recipe says.
        snapshots: Snapshots that have been measured.
        detail: Why it ended as it did.
    """

    run_id: str
    status: str
    updates: int
    max_updates: int | None
    snapshots: int
    detail: str

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in set(RunStatus) and RunStatus(self.status).complete

    def cells(self) -> tuple[str, str, str, str, str]:
        """Return the row as text: run, status, updates, snapshots, detail."""
        most = "" if self.max_updates is None else f"/{self.max_updates}"
        updates = f"{self.updates}{most}"
        return (self.run_id, self.status, updates, str(self.snapshots), self.detail)


def recorded_recipe(set_dir: Path | str) -> Recipe:
    """Return the recipe that a set of runs was made from.

    Raises:
        RunDirectoryError: If the directory holds no set of runs, or a damaged one.
    """
    content = read_set(set_dir)
    try:
        return Recipe.from_table(
            TypeAdapter(Table).validate_python(content.get("recipe"))
        )
    except (RecipeError, ValidationError) as error:
        key, _, text = str(error).splitlines()[0].partition(": ")
        raise RunDirectoryError(
            f"{Path(set_dir) / 'set.json'} needs a recipe of this version, got one "
            f"whose {key} does not fit ({text}); run the recipe again into a new "
            "directory."
        ) from error


def status(set_dir: Path | str) -> list[RunProgress]:
    """Return how far each run is, also while others are at work; nothing is written.

    Args:
        set_dir: A set of runs, or the directory of one run. Where the recipe of a set
            is lost, the runs that are there are listed.

    Raises:
        RunDirectoryError: If there is no run.
    """
    path = Path(set_dir)
    if (path / "manifest.json").exists():
        own = RunDirectory.open(path).manifest.run_id
        return [_run_progress(own, path, None)]
    try:
        specs = recorded_recipe(path).run_specs()
    except RunDirectoryError:
        found = sorted((path / "runs").glob("*/"))
        if not found:
            raise
        return [_run_progress(run.name, run, None) for run in found]
    rows = {
        spec.run_id: _run_progress(
            spec.run_id, path / "runs" / spec.run_id, spec.max_updates
        )
        for spec in specs
    }
    return [_waiting(spec, rows) for spec in specs]


def _waiting(spec: RunSpec, rows: Mapping[str, RunProgress]) -> RunProgress:
    """Return a run's row; one that has not begun says what it waits for, if so."""
    row = rows[spec.run_id]
    if spec.start is None or row.status not in {"missing", RunStatus.CREATED}:
        return row
    origin = rows[run_id_of(spec.start.arm, spec.seed)]
    if origin.complete:
        return row
    return replace(row, status="waiting", detail=f"for run {origin.run_id}")


def _run_progress(run_id: str, path: Path, max_updates: int | None) -> RunProgress:
    progress = RunProgress(run_id, "missing", 0, max_updates, 0, "")
    if not path.exists():
        return progress
    try:
        run = RunDirectory.open(path, run_id=run_id)
        damage = run.damage()
        tables = ("evaluations",) if max_updates else ("evaluations", "steps")
        steps = [run.read(name, columns=["step"]).column("step") for name in tables]
        measured = run.read("measurements", columns=["snapshot"]).column("snapshot")
    except RunDirectoryError as error:
        return replace(progress, status="damaged", detail=str(error))
    return replace(
        progress,
        status="damaged" if damage else _status(run),
        updates=max(pc.max(column).as_py() or 0 for column in steps),
        snapshots=len(measured.unique()),
        detail="; ".join(damage) or run.manifest.reason,
    )


def _status(run: RunDirectory) -> str:
    """Return the manifest's status; a run that nobody is at was interrupted."""
    status = run.manifest.status
    return "interrupted" if status is RunStatus.RUNNING and not run.locked else status
