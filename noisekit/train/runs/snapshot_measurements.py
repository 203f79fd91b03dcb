"""One measure at one snapshot: what tasks share, and the rows that they give."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.records import RunDirectory
from noisekit.sharpness import Measurement
from noisekit.train.data.section import TensorPair
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.evaluate import errors_of_examples
from noisekit.train.runs.measured_model import MeasuredModel, measurement_row
from noisekit.train.runs.snapshots import load_weights
from noisekit.train.runs.state import Row
from noisekit.train.section import Split

OUTCOMES: Mapping[str, Split] = {
    "train_outcomes": "train",
    "validation_outcomes": "validation",
    "test_outcomes": "test",
}
_EXAMPLE_NORMS = "example_grad_sq_norm"
FILL_EXAMPLES = frozenset({*OUTCOMES, _EXAMPLE_NORMS})


@dataclass(frozen=True, slots=True)
class Task:
    """One measure at one snapshot.

    Attributes:
        snapshot: The snapshot.
        measure: A name of the recipe, or the outcomes of one split.
        step: The snapshot's update.
        learning_rate: The rate that led there.
        phase: The phase that led there.
    """

    snapshot: str
    measure: str
    step: int
    learning_rate: float
    phase: int = 0


@dataclass(frozen=True, slots=True)
class TaskRows:
    """What one task gives: rows of the measurements and of the examples table."""

    measurements: list[Row]
    examples: list[Row]


class SnapshotMeasurements:
    """Takes tasks; holds the model, the risk and the graph of its gradient."""

    def __init__(
        self,
        spec: RunSpec,
        run: RunDirectory,
        model: nn.Module,
        *,
        data: Mapping[str, TensorPair],
        tasks: Iterable[Task],
        rows: Iterable[Row],
    ) -> None:
        self._spec = spec
        self._run = run
        self._measured_model = MeasuredModel(spec, model, data)
        self._data = data
        self._steps = {task.snapshot: task.step for task in tasks}
        self._done: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self._note(row)
        self._loaded = ""

    def close(self) -> None:
        """Free the kept graph."""
        self._measured_model.close()

    def has(self, task: Task) -> bool:
        """Whether the task is done."""
        return (task.snapshot, task.measure) in self._done

    def measure(self, task: Task) -> TaskRows:
        """Take one task; a measure that cannot be had is recorded and is no error."""
        began = time.monotonic()
        rows = self._copied(task) or self._measured(task)
        share = (time.monotonic() - began) / len(rows.measurements)
        for row in rows.measurements:
            row["seconds"] = share
            self._note(row)
        return rows

    def _note(self, row: Row) -> None:
        key = (str(row["snapshot"]), str(row["measure"]))
        self._done.setdefault(key, []).append(row)

    def _copied(self, task: Task) -> TaskRows | None:
        """Return what was measured at an earlier snapshot of the same weights."""
        if task.measure in FILL_EXAMPLES:
            return None
        for snapshot, step in self._steps.items():
            rows = self._done.get((snapshot, task.measure))
            if rows and step == task.step:
                own: Row = {"snapshot": task.snapshot, "num_matvecs": 0, "num_grads": 0}
                return TaskRows([{**row, **own} for row in rows], [])
        return None

    def _measured(self, task: Task) -> TaskRows:
        self._load(task.snapshot)
        if task.measure in OUTCOMES:
            return self._outcomes(task)
        top = self._done.get((task.snapshot, "lambda_max"), [])
        items = self._measured_model.measure(
            task.measure,
            step=task.step,
            learning_rate=task.learning_rate,
            phase=task.phase,
            lambda_max=_estimate(top[0]) if top else None,
        )
        return TaskRows(
            [_row(task, item) for item in items],
            [row for item in items for row in self._example_rows(task, item)],
        )

    def _load(self, snapshot: str) -> None:
        if snapshot != self._loaded:
            weights = load_weights(self._run, snapshot)
            self._measured_model.model.load_state_dict(weights)
            self._loaded = snapshot

    def _example_rows(self, task: Task, item: Measurement) -> list[Row]:
        """Return a row for each example that has a value of its own."""
        if item.quantity != _EXAMPLE_NORMS or item.per_example is None:
            return []
        values = item.per_example.tolist()
        return [
            {
                "snapshot": task.snapshot,
                "split": "train",
                "example": example,
                _EXAMPLE_NORMS: value,
            }
            for example, value in zip(
                self._measured_model.examples, values, strict=True
            )
        ]

    def _outcomes(self, task: Task) -> TaskRows:
        """Return the error of one split, and the outcome of each of its examples."""
        split = OUTCOMES[task.measure]
        errors = errors_of_examples(
            self._measured_model.model,
            self._data[split],
            self._spec.training.find_loss(),
            batch_size=self._spec.evaluation.batch_size,
        )
        count = len(errors)
        correct = [error == 0 for error in errors]
        error = 1 - sum(1 - error for error in errors) / count
        mean_square = sum(error**2 for error in errors) / count
        # mean_square is the error itself where each example is right or wrong.
        variance = error * (1 - error) - (sum(errors) / count - mean_square)
        estimate = Estimate(
            error,
            stderr=(max(variance, 0.0) / count) ** 0.5,
            error_source=ErrorSource.DATA,
            num_samples=count,
        )
        rows: list[Row] = [
            {"snapshot": task.snapshot, "split": split, "example": i, "correct": flag}
            for i, flag in enumerate(correct)
        ]
        return TaskRows([_row(task, Measurement(f"{split}_error", estimate))], rows)


def _row(task: Task, item: Measurement) -> Row:
    return {"snapshot": task.snapshot, **measurement_row(task.measure, item)}


def _estimate(row: Row) -> Estimate:
    """Return the solver's estimate that a row was made of."""
    value, bound = row["value"], row["bound"]
    assert isinstance(value, float)
    assert bound is None or isinstance(bound, float)
    return Estimate(
        value,
        bound=bound,
        error_source=ErrorSource.SOLVER,
        status=Status(str(row["status"])),
    )
