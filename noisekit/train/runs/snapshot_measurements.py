"""One measure at one snapshot: what tasks share, and the rows that they give."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from noisekit.core.randomness import stream
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator
from noisekit.records import RunDirectory
from noisekit.records.files import plain
from noisekit.sharpness import Measurement, MeasurementContext, SGDRule
from noisekit.sharpness.measurement import take
from noisekit.train.data.section import TensorPair
from noisekit.train.losses import find_loss
from noisekit.train.recipes.optimizers import Sgd
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.evaluate import correct_examples
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
    """

    snapshot: str
    measure: str
    step: int
    learning_rate: float


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
        self._model = model.eval()
        self._data = data
        self._steps = {task.snapshot: task.step for task in tasks}
        self._done: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self._note(row)
        self._loaded = ""
        self._hessian: HessianOperator | None = None

    def close(self) -> None:
        """Free the kept graph."""
        if self._hessian is not None:
            self._hessian.close()

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
        measures = self._spec.measure.measures(task.measure)
        items = [
            item
            for taken in take(measures, self._context(task))
            for item in taken.measurements
        ]
        return TaskRows(
            [_row(task, item) for item in items],
            [row for item in items for row in self._example_rows(task, item)],
        )

    def _load(self, snapshot: str) -> None:
        if snapshot != self._loaded:
            self._model.load_state_dict(load_weights(self._run, snapshot))
            self._loaded = snapshot

    def _context(self, task: Task) -> MeasurementContext:
        """Return the model at a snapshot, to be measured.

        Streams are named by seed and update; what one task computes no other sees, so
        that rows do not depend on where a run was interrupted.
        """
        if self._hessian is None:
            self._hessian = HessianOperator(self._risk())
        top = self._done.get((task.snapshot, "lambda_max"), [])
        return MeasurementContext(
            self._hessian.risk,
            stream=partial(stream, self._spec.seed, "measure", task.step),
            update_rule=_update_rule(self._spec, task.learning_rate),
            hessian=self._hessian,
            lambda_max=_estimate(top[0]) if top else None,
        )

    def _risk(self) -> EmpiricalRisk:
        """Return the risk over the examples that all runs are measured on."""
        train, settings = self._data["train"], self._spec.measure
        inputs, targets = train.inputs, train.targets
        if settings.num_examples is not None:
            chosen = torch.tensor(self._measured_examples(), device=targets.device)
            inputs, targets = inputs[chosen], targets[chosen]
        size = self._spec.evaluation.batch_size
        batches = zip(
            torch.split(inputs, size), torch.split(targets, size), strict=True
        )
        return EmpiricalRisk(
            self._model,
            find_loss(self._spec.training.loss).mean,
            list(batches),
            bn=settings.bn,
        )

    def _measured_examples(self) -> list[int]:
        """Return the training examples that every run of the data is measured on."""
        count = len(self._data["train"])
        if self._spec.measure.num_examples is None:
            return list(range(count))
        generator = stream(self._spec.data.split_seed, "measured examples")
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order[: self._spec.measure.num_examples]

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
            for example, value in zip(self._measured_examples(), values, strict=True)
        ]

    def _outcomes(self, task: Task) -> TaskRows:
        """Return the error of one split, and the outcome of each of its examples."""
        split = OUTCOMES[task.measure]
        correct = correct_examples(
            self._model,
            self._data[split],
            find_loss(self._spec.training.loss),
            batch_size=self._spec.evaluation.batch_size,
        )
        count = len(correct)
        error = 1 - sum(correct) / count
        estimate = Estimate(
            error,
            stderr=(error * (1 - error) / count) ** 0.5,
            error_source=ErrorSource.DATA,
            num_samples=count,
        )
        rows: list[Row] = [
            {"snapshot": task.snapshot, "split": split, "example": i, "correct": flag}
            for i, flag in enumerate(correct)
        ]
        return TaskRows([_row(task, Measurement(f"{split}_error", estimate))], rows)


def _update_rule(spec: RunSpec, learning_rate: float) -> SGDRule | None:
    """The rule of the update that led to a snapshot; ``None`` of another optimizer."""
    optimizer = spec.optimizer
    if not isinstance(optimizer, Sgd) or learning_rate <= 0:
        return None
    return SGDRule(
        lr=learning_rate,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        weight_decay=optimizer.weight_decay,
    )


def _row(task: Task, item: Measurement) -> Row:
    estimate = item.estimate
    interval = estimate.interval() if estimate.has_error else None
    detail = dict(item.detail)
    if item.data_stderr is not None:
        detail["data_stderr"] = item.data_stderr
    return {
        "snapshot": task.snapshot,
        "measure": task.measure,
        "quantity": item.quantity,
        "variant": item.variant,
        "value": estimate.value,
        "stderr": estimate.stderr,
        "bound": estimate.bound,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "error_source": estimate.error_source,
        "num_samples": estimate.num_samples,
        "status": estimate.status.value,
        "num_matvecs": estimate.num_matvecs,
        "num_grads": estimate.num_grads,
        "detail": json.dumps(plain(detail)),
    }


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
