"""Measuring a run's snapshots, one after the other, resumable between any two."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from torch import nn

from noisekit.records import RunDirectory
from noisekit.records.writer import Cell
from noisekit.train.data.section import TensorPair
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.progress import ProgressReporter
from noisekit.train.runs.snapshot_measurements import (
    FILL_EXAMPLES,
    OUTCOMES,
    SnapshotMeasurements,
    Task,
)
from noisekit.train.runs.state import Row


def measure_run(
    spec: RunSpec,
    run: RunDirectory,
    model: nn.Module,
    *,
    data: Mapping[str, TensorPair],
    report: ProgressReporter,
) -> dict[str, float]:
    """Measure what the recipe asks for at each snapshot that was taken.

    A task is done once its rows are durable; after a kill the others follow. Each has
    random streams of its own, so that what is measured does not depend on what was
    measured before.

    Args:
        spec: The run.
        run: Its directory.
        model: A model to load the weights into.
        data: The data by split, on the model's device.
        report: Receives one event per task.

    Returns:
        What measuring took: ``measure_seconds``, ``num_matvecs``, ``num_grads``.
    """
    tasks = planned_tasks(spec, run)
    rows: list[Row] = run.read("measurements").rows.to_pylist()
    with ExitStack() as stack:
        results = stack.enter_context(run.writer("measurements"))
        first_row = _num_example_rows(rows)
        examples = stack.enter_context(run.writer("examples", first_row=first_row))
        taker = SnapshotMeasurements(
            spec, run, model, data=data, tasks=tasks, rows=rows
        )
        stack.callback(taker.close)
        for number, task in enumerate(tasks, start=1):
            if not taker.has(task):
                new = taker.measure(task)
                # Examples first: it is the other row that marks the task as done.
                examples.append_together(new.examples)
                report("measure", number - 1, len(tasks), "examples are durable")
                results.append_together(new.measurements)
                rows += new.measurements
            what = f"{task.measure} at {task.snapshot}"
            report("measure", number, len(tasks), what)
    return _costs(rows)


def planned_tasks(spec: RunSpec, run: RunDirectory) -> list[Task]:
    """Return what the recipe asks for at the snapshots that were taken, in order."""
    outcomes = [
        name for name, part in OUTCOMES.items() if part in spec.measure.examples
    ]
    return [
        Task(
            row["snapshot"],
            measure,
            row["step"],
            row["learning_rate"],
            row["phase"] or 0,
        )
        for row in run.read("snapshots").rows.to_pylist()
        for measure in (*spec.measure.measures_at(row["snapshot"]), *outcomes)
    ]


def _num_example_rows(rows: Iterable[Row]) -> int:
    """Return how many rows of the examples table belong to tasks that are done."""
    return int(
        _total(
            row["num_samples"]
            for row in rows
            if row["measure"] in FILL_EXAMPLES and row["snapshot"] is not None
        )
    )


def _costs(rows: Iterable[Row]) -> dict[str, float]:
    names = {
        "seconds": "measure_seconds",
        "num_matvecs": "num_matvecs",
        "num_grads": "num_grads",
    }
    rows = list(rows)
    costs = {
        cost: _total(row[column] for row in rows) for column, cost in names.items()
    }
    # A series is measured while the run trains, and its time is training's.
    of_series = (row["seconds"] for row in rows if row["snapshot"] is None)
    return {**costs, "measure_seconds": costs["measure_seconds"] - _total(of_series)}


def _total(cells: Iterable[Cell]) -> float:
    return float(sum(cell for cell in cells if isinstance(cell, int | float)))
