"""One measure at one snapshot: what tasks share, and the rows that they give."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from noisekit.core.errors import NoisekitError
from noisekit.core.randomness import stream
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator
from noisekit.probes import example_sq_norms
from noisekit.records import RunDirectory
from noisekit.records.files import plain
from noisekit.train.data.datasets import TensorPair
from noisekit.train.recipes.measure_spec import MeasureName
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.evaluate import correct_examples
from noisekit.train.runs.measures import (
    MEASURES,
    Measured,
    Subject,
    snapshot_subject,
)
from noisekit.train.runs.snapshots import load_weights
from noisekit.train.runs.state import Row
from noisekit.train.section import Split

OUTCOMES: Mapping[str, Split] = {
    "train_outcomes": "train",
    "validation_outcomes": "validation",
    "test_outcomes": "test",
}
_EXAMPLE_NORMS: MeasureName = "example_grad_sq_norm"
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
class Found:
    """What one task found: rows of the measurements and of the examples table."""

    measurements: list[Row]
    examples: list[Row]


class Bench:
    """Holds what tasks share: the model, the risk and the graph of its gradient."""

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

    def measure(self, task: Task) -> Found:
        """Measure one thing; a refusal is recorded and is no error."""
        began = time.monotonic()
        found = self._copied(task) or self._measured(task)
        share = (time.monotonic() - began) / len(found.measurements)
        for row in found.measurements:
            row["seconds"] = share
            self._note(row)
        return found

    def _note(self, row: Row) -> None:
        key = (str(row["snapshot"]), str(row["measure"]))
        self._done.setdefault(key, []).append(row)

    def _copied(self, task: Task) -> Found | None:
        """Return what was measured at an earlier snapshot of the same weights."""
        if task.measure in FILL_EXAMPLES:
            return None
        for snapshot, step in self._steps.items():
            rows = self._done.get((snapshot, task.measure))
            if rows and step == task.step:
                own: Row = {"snapshot": task.snapshot, "num_matvecs": 0, "num_grads": 0}
                return Found([{**row, **own} for row in rows], [])
        return None

    def _measured(self, task: Task) -> Found:
        self._load(task.snapshot)
        measured: list[Measured] = []
        examples: list[Row] = []
        try:
            if task.measure in OUTCOMES:
                measured, examples = self._outcomes(task)
            elif task.measure == _EXAMPLE_NORMS:
                measured, examples = self._example_norms(task)
            else:  # what comes before a refusal is kept
                measured.extend(MEASURES[task.measure](self._subject(task)))
        except NoisekitError as error:
            measured.append(_refusal(task, error))
        return Found([_row(task, item) for item in measured], examples)

    def _load(self, snapshot: str) -> None:
        if snapshot != self._loaded:
            self._model.load_state_dict(load_weights(self._run, snapshot))
            self._loaded = snapshot

    def _subject(self, task: Task) -> Subject:
        if self._hessian is None:
            self._hessian = HessianOperator(self._risk())
        top = self._done.get((task.snapshot, "lambda_max"), [])
        return snapshot_subject(
            self._spec,
            self._hessian,
            step=task.step,
            learning_rate=task.learning_rate,
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
            self._model, nn.CrossEntropyLoss(), list(batches), bn=settings.bn
        )

    def _measured_examples(self) -> list[int]:
        """Return the training examples that every run of the data is measured on."""
        count = len(self._data["train"])
        if self._spec.measure.num_examples is None:
            return list(range(count))
        generator = stream(self._spec.data.split_seed, "measured examples")
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order[: self._spec.measure.num_examples]

    def _example_norms(self, task: Task) -> tuple[list[Measured], list[Row]]:
        """Return the mean squared gradient norm per example, and each example's."""
        risk = self._subject(task).risk
        norms = example_sq_norms(risk.model, risk.loss_fn, risk.batches, bn=risk.bn)
        norms = norms.cpu().double()
        estimate = Estimate(
            float(norms.mean()),
            stderr=float(norms.std() / len(norms) ** 0.5),
            error_source=ErrorSource.DATA,
            num_samples=len(norms),
            num_grads=1,
        )
        rows: list[Row] = [
            {
                "snapshot": task.snapshot,
                "split": "train",
                "example": example,
                _EXAMPLE_NORMS: norm,
            }
            for example, norm in zip(
                self._measured_examples(), norms.tolist(), strict=True
            )
        ]
        return [Measured(_EXAMPLE_NORMS, estimate)], rows

    def _outcomes(self, task: Task) -> tuple[list[Measured], list[Row]]:
        """Return the error of one split, and the outcome of each of its examples."""
        split = OUTCOMES[task.measure]
        correct = correct_examples(
            self._model,
            self._data[split],
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
        return [Measured(f"{split}_error", estimate)], rows


def _row(task: Task, measured: Measured) -> Row:
    estimate = measured.estimate
    interval = estimate.interval() if estimate.has_error else None
    detail = dict(measured.detail)
    if measured.data_stderr is not None:
        detail["data_stderr"] = measured.data_stderr
    return {
        "snapshot": task.snapshot,
        "measure": task.measure,
        "quantity": measured.quantity,
        "variant": measured.variant,
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


def _refusal(task: Task, error: NoisekitError) -> Measured:
    quantity = OUTCOMES.get(task.measure, task.measure)
    nothing = Estimate(math.nan, status=Status.UNAVAILABLE)
    return Measured(quantity, nothing, detail={"error": str(error)})
