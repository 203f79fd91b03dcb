"""What a set of runs was made from, and how far its runs are."""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
from pydantic import ValidationError

from noisekit.core.errors import RunDirectoryError, RunLockedError
from noisekit.records import RunDirectory, RunStatus, exclusive_lock, read_set
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSpec


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far one run is.

    Attributes:
        run_id: The run.
        status: As in its manifest, or ``missing``, ``damaged``, ``interrupted``.
        updates: Updates up to its last evaluation.
        max_updates: Most updates that it may take.
        snapshots: Snapshots that have been measured.
        detail: Why it ended as it did.
    """

    run_id: str
    status: str
    updates: int
    max_updates: int
    snapshots: int
    detail: str

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in {RunStatus.DONE, RunStatus.DIVERGED}

    def cells(self) -> tuple[str, str, str, str, str]:
        """Return the row as text: run, status, updates, snapshots, detail."""
        updates = f"{self.updates}/{self.max_updates}"
        return (self.run_id, self.status, updates, str(self.snapshots), self.detail)


def recorded_recipe(set_dir: Path | str) -> Recipe:
    """Return the recipe that a set of runs was made from.

    Raises:
        RunDirectoryError: If the directory holds no set of runs, or a damaged one.
    """
    content = read_set(set_dir)
    try:
        return Recipe.from_json(json.dumps(content.get("recipe")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "recipe"
        raise RunDirectoryError(
            f"{Path(set_dir) / 'set.json'} needs a recipe of this version, got one "
            f"whose {where} does not fit ({first['msg']}); run the recipe again into a "
            "new directory."
        ) from error


def status(set_dir: Path | str) -> list[RunProgress]:
    """Return how far each run of a set is, also while others are at work on it."""
    path = Path(set_dir)
    return [
        _run_progress(spec, path / "runs" / spec.run_id)
        for spec in recorded_recipe(path).run_specs()
    ]


def _run_progress(spec: RunSpec, path: Path) -> RunProgress:
    bare = RunProgress(spec.run_id, "missing", 0, spec.max_updates, 0, "")
    if not path.exists():
        return bare
    try:
        run = RunDirectory.open(path)
        steps = run.read("evaluations").rows["step"]
        measured = run.read("measurements").rows["snapshot"]
    except RunDirectoryError as error:
        return RunProgress(spec.run_id, "damaged", 0, spec.max_updates, 0, str(error))
    return RunProgress(
        run_id=spec.run_id,
        status=_status(run),
        updates=pc.max(steps).as_py() or 0,
        max_updates=spec.max_updates,
        snapshots=len(measured.unique()),
        detail=run.manifest.reason,
    )


def _status(run: RunDirectory) -> str:
    """Return the manifest's status; a run that nobody is at was interrupted."""
    if run.manifest.status is not RunStatus.RUNNING:
        return run.manifest.status.value
    try:
        with exclusive_lock(run.path / "lock", what=run.manifest.run_id):
            return "interrupted"
    except RunLockedError:
        return run.manifest.status.value
