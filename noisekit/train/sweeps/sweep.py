"""From a recipe to a directory of runs, and back to what is left to do."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from noisekit.core import references
from noisekit.core.arguments import checked
from noisekit.core.errors import (
    NewerFormatError,
    RecipeError,
    RunDirectoryError,
    RunFailedError,
    UsageError,
)
from noisekit.core.evaluation_mode import batch_norms
from noisekit.records import (
    Manifest,
    RunDirectory,
    Runs,
    RunStatus,
    exclusive_lock,
    open_runs,
    read_set,
    write_set,
)
from noisekit.records.files import exists, make_directory
from noisekit.records.provenance import software_versions
from noisekit.train.data.datasets import DataSplits, load_data
from noisekit.train.models import build_model
from noisekit.train.recipes.consistency import coupling_faults
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.tables import Table, differences
from noisekit.train.runs.progress import Progress, no_progress
from noisekit.train.sweeps.executors import execute_here, execute_in_processes
from noisekit.train.sweeps.job_queue import Job, JobOutcome
from noisekit.train.sweeps.run_status import recorded_recipe, status

_LISTED = 5
_OF_A_SET = frozenset(
    {"lock", "set.json", ".set.json.tmp", "runs", "report.html", "analyses"}
)
"""What noisekit writes into the directory of a set."""


@checked
def run(
    recipe: Recipe,
    out_dir: Path | str,
    *,
    workers: int | None = None,
    device: str | None = None,
    seeds: int | None = None,
    progress: Progress | None = None,
    allow_download: bool = False,
    allow_code: bool = False,
) -> Runs:
    """Execute every arm at every seed of a recipe, and return the runs.

    In a directory that already holds runs of the same recipe, only what is missing is
    executed. A run that starts from another begins once that is complete. A run that
    diverges is a result; one that fails stops those alone that start from it, and in
    the end ``RunFailedError`` names it. A directory that holds
    anything else, and what this machine lacks, are refused before the first run.

    Args:
        recipe: The experiment.
        out_dir: Where the set of runs goes; made if it is not there.
        workers: Processes at the same time; the recipe's number if left out, 0 for
            none but this one.
        device: Device of all runs, instead of the recipe's.
        seeds: Number of seeds, instead of the recipe's.
        progress: Called with the events of all runs.
        allow_download: Whether data that are not found may be asked of the network.
        allow_code: Whether code of the user's own that the recipe names, as
            ``module:function``, may be imported and run.
    """
    _check_workers(workers)
    path = Path(out_dir)
    progress = no_progress if progress is None else progress
    with references.allow_code(allow_code):
        references.check_allowed(recipe.named_code, recipe=recipe.name)
        recipe = recipe.adjusted(device=device, seeds=seeds)
        _check_place(path, recipe)
        data = _check_machine(recipe, allow_download=allow_download)
        make_directory(path)
        with exclusive_lock(path / "lock", what=f"the set of runs {path}"):
            _write_recipe(path, recipe, data)
            return _execute_remaining(path, recipe, workers, progress)


@checked
def resume(
    set_dir: Path | str,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    allow_code: bool = False,
) -> Runs:
    """Execute what is not complete in a set of runs, and return the runs.

    Args:
        set_dir: Directory that ``run`` made.
        workers: Processes at the same time; the recipe's number if left out, 0 for
            none but this one.
        progress: Called with the events of all runs.
        allow_code: Whether code of the user's own that the recipe names, as
            ``module:function``, may be imported and run.
    """
    _check_workers(workers)
    path = Path(set_dir)
    progress = no_progress if progress is None else progress
    recipe = recorded_recipe(path)
    with references.allow_code(allow_code):
        references.check_allowed(recipe.named_code, recipe=recipe.name)
        _check_machine(recipe, allow_download=False)
        with exclusive_lock(path / "lock", what=f"the set of runs {path}"):
            return _execute_remaining(path, recipe, workers, progress)


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 0:
        raise UsageError(
            f"workers needs a number of processes, or 0 for none but this one, got "
            f"{workers}; leave it out to take the recipe's number."
        )


def _check_place(path: Path, recipe: Recipe) -> None:
    """Refuse a directory that holds anything but runs of this recipe."""
    if not exists(path):
        return
    if not path.is_dir():
        raise UsageError(f"runs need a directory, got the file {path}; use another.")
    try:
        recorded = recorded_recipe(path)
    except NewerFormatError:
        raise
    except RunDirectoryError:
        _check_what_is_left(path, recipe)
        return
    different = differences(_identity(recorded), _identity(recipe))
    if different:
        listed = ", ".join(different[:_LISTED])
        more = ", ..." if len(different) > _LISTED else ""
        raise UsageError(
            f"{path} holds runs of another recipe, which differs in {listed}"
            f"{more}; choose another --out, or finish those with "
            f"`noisekit resume {path}`."
        )


def _check_what_is_left(path: Path, recipe: Recipe) -> None:
    """Refuse a directory without a usable set.json, unless all in it is the recipe's.

    So it is where a sweep ended before it could write the file, or lost it since.
    """
    others = [item.name for item in path.iterdir() if item.name not in _OF_A_SET]
    if others:
        raise UsageError(
            f"runs need a new or empty directory, got {path}, which holds other files "
            f"({', '.join(sorted(others)[:_LISTED])}); choose another --out."
        )
    planned = {spec.run_id: spec.model_dump(mode="json") for spec in recipe.run_specs()}
    for child in sorted((path / "runs").glob("*/")):
        try:
            manifest = RunDirectory.open(child).manifest
        except RunDirectoryError:
            continue  # executing it says what is wrong
        if planned.get(manifest.run_id) != manifest.recipe:
            raise UsageError(
                f"{path} has lost its set.json and holds {child.name}, which is no run "
                "of this recipe; run the recipe that made it, or choose another --out."
            )


def _identity(recipe: Recipe) -> Table:
    """Return what makes two recipes the same: not its words, nor how many workers."""
    words: Any = {"title": True, "cost": True, "seeds": {"planned"}}
    content: Table = recipe.model_dump(mode="json", exclude=words)
    compute = content["compute"]
    assert isinstance(compute, dict)
    del compute["workers"]
    return content


def _check_machine(recipe: Recipe, *, allow_download: bool) -> DataSplits:
    """Find out what is missing before the first run, and not in each of them."""
    _check_device(recipe.compute.device)
    specs = recipe.run_specs()
    for data_spec in dict.fromkeys(spec.data for spec in specs):
        data = load_data(data_spec, allow_download=allow_download)
        for spec in (spec for spec in specs if spec.data == data_spec):
            if spec.seed == recipe.seeds.first:
                _check_network(spec, data)
    return load_data(specs[0].data)


def _check_network(spec: RunSpec, data: DataSplits) -> None:
    """Build the network of an arm once, and ask what it leaves the probe to read."""
    model = build_model(
        spec.model,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        seed=spec.seed,
    )
    spec.training.find_loss()
    for name in spec.measure.names:
        spec.measure.measures(name)
    faults = list(coupling_faults(spec, coupled=bool(batch_norms(model))))
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise RecipeError(f"arm {spec.arm!r} of {spec.recipe!r}:\n{listed}")


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).partition("\n")[0]
        raise UsageError(
            f"compute.device needs a device of this machine, got {name!r} "
            f"({first_line}); `noisekit doctor` lists them, and cpu always works."
        ) from error


def _write_recipe(path: Path, recipe: Recipe, data: DataSplits) -> None:
    with suppress(RunDirectoryError):
        recorded_recipe(path)
        return
    write_set(
        path,
        {
            "recipe": recipe.model_dump(mode="json"),
            "runs": [spec.run_id for spec in recipe.run_specs()],
            "data": {"name": data.name, "origin": data.origin, "sha256": data.sha256},
            "versions": software_versions(),
        },
    )


def _execute_remaining(
    path: Path, recipe: Recipe, workers: int | None, progress: Progress
) -> Runs:
    allow_code = references.code_allowed()
    jobs = [
        Job(spec, path / "runs" / spec.run_id, allow_code)
        for spec in recipe.run_specs()
    ]
    _check_format(path)
    left = [job for job in jobs if not _complete(job)]
    damaged = [outcome for job in jobs if (outcome := _damage(job))]
    count = recipe.compute.workers if workers is None else workers
    try:
        if count == 0:
            outcomes = execute_here(left, progress=progress)
        else:
            outcomes = execute_in_processes(
                left, workers=count, threads=recipe.compute.threads, progress=progress
            )
    except KeyboardInterrupt as stop:
        stop.args = (
            f"Stopped. What was computed is kept; go on with `noisekit resume {path}`.",
        )
        raise
    _raise_failures(path, [*damaged, *outcomes], len(jobs))
    return open_runs(path)


def _check_format(path: Path) -> None:
    """Refuse to go on with runs that an older noisekit described in format 1."""
    recorded = read_set(path).get("recipe")
    if not isinstance(recorded, dict) or recorded.get("format") != 1:
        return
    left = [row.run_id for row in status(path) if not row.complete]
    if left:
        raise UsageError(
            f"{path} was recorded in format 1, which is read but not continued, and "
            f"{len(left)} of its runs are not complete; run the recipe again into a "
            "new directory."
        )


def _complete(job: Job) -> bool:
    """Make the run's directory if it has none, and return whether nothing is left.

    Not so where a complete run was killed before it could remove its checkpoints.
    """
    try:
        if not (job.path / "manifest.json").exists():
            RunDirectory.create(job.path, _manifest(job.spec))
        run = RunDirectory.open(job.path, run_id=job.spec.run_id)
        saved = any(run.checkpoints.glob("*.safetensors"))
        return run.manifest.status.complete and not saved
    except RunDirectoryError:
        return False  # executing it says what is wrong


def _damage(job: Job) -> JobOutcome | None:
    """Return what a complete run has lost, as a failure, or ``None``."""
    try:
        run = RunDirectory.open(job.path, run_id=job.spec.run_id)
    except RunDirectoryError:
        return None
    damage = run.damage() if run.manifest.status.complete else []
    reason = "; ".join(damage)
    return JobOutcome(job.spec.run_id, RunStatus.FAILED, reason) if damage else None


def _manifest(spec: RunSpec) -> Manifest:
    return Manifest(
        run_id=spec.run_id,
        arm=spec.arm,
        seed=spec.seed,
        factors=spec.factors,
        recipe=spec.model_dump(mode="json"),
    )


def _raise_failures(path: Path, outcomes: Sequence[JobOutcome], total: int) -> None:
    failed = [item for item in outcomes if item.status is RunStatus.FAILED]
    if not failed:
        return
    lines = [f"{len(failed)} of {total} runs failed; the others are complete:"]
    lines += [f"  {item.run_id}: {item.reason}" for item in failed[:_LISTED]]
    if len(failed) > _LISTED:
        lines.append(f"  and {len(failed) - _LISTED} more: `noisekit status {path}`")
    lines.append(f"Once the cause is gone, go on with `noisekit resume {path}`.")
    raise RunFailedError("\n".join(lines))
