"""One run, top to bottom: train, keep snapshots, measure them, seal."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from noisekit.core.errors import StorageError
from noisekit.core.evaluation_mode import batch_norms
from noisekit.records import RunDirectory, RunStatus
from noisekit.train.data.datasets import DataSplits, load_data
from noisekit.train.data.section import TensorPair
from noisekit.train.models import build_model
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.checkpoint import remove_checkpoints
from noisekit.train.runs.environment import begin, computing
from noisekit.train.runs.measure import measure_run
from noisekit.train.runs.origin import find_origin, start_state
from noisekit.train.runs.progress import Phase, Progress, ProgressReporter, no_progress
from noisekit.train.runs.series import SeriesMeasurements
from noisekit.train.runs.state import TrainState
from noisekit.train.runs.training import Training

_ENDS: Mapping[RunStatus, Phase] = {
    RunStatus.DONE: "done",
    RunStatus.DIVERGED: "diverged",
    RunStatus.SKIPPED: "skipped",
}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        run_id: The run.
        status: ``DONE``, ``DIVERGED`` or ``SKIPPED``.
        reason: Which stop rule ended training, or where the loss left the numbers.
        costs: What it took, such as ``train_seconds``.
    """

    run_id: str
    status: RunStatus
    reason: str
    costs: Mapping[str, float]


def train_run(
    spec: RunSpec, run: RunDirectory, *, progress: Progress | None = None
) -> RunOutcome:
    """Start a run or go on with it, until it is trained, measured and sealed.

    Killed at any moment and called again, it ends in the same bits as if it had not
    been killed, on the same processor, PyTorch build and number of threads. A loss
    that is not finite ends the run as diverged, and one whose start was never reached
    by the run that it starts from is skipped; both are results and no errors.

    Args:
        spec: The run.
        run: Its directory.
        progress: Called at each sign of life.
    """
    report = ProgressReporter(spec.run_id, progress or no_progress)
    with run.lock(), computing(spec.compute) as threads:
        if not run.manifest.status.complete:
            with _failure_on_record(run, report):
                _complete(spec, run, threads=threads, report=report)
        # Only now: a run that is not complete would start anew without one.
        remove_checkpoints(run.checkpoints)
    manifest = run.manifest
    report(_ENDS[manifest.status], spec.max_updates, spec.max_updates, manifest.reason)
    return RunOutcome(spec.run_id, manifest.status, manifest.reason, manifest.costs)


def _complete(
    spec: RunSpec, run: RunDirectory, *, threads: int, report: ProgressReporter
) -> None:
    origin = find_origin(spec, run)
    splits = load_data(spec.data)
    begin(run, splits)
    if origin is not None and origin.missing:
        _skip(run, origin.missing)
        return
    data = _on_device(splits, spec)

    def build() -> nn.Module:
        return build_model(
            spec.model,
            input_shape=splits.input_shape,
            num_classes=splits.num_classes,
            seed=spec.seed,
        ).to(spec.compute.device, _DTYPES[spec.compute.dtype])

    model = build()
    network = {
        "num_params": sum(p.numel() for p in model.parameters()),
        "batch_norms": len(batch_norms(model)),
    }
    run.write_manifest(replace(run.manifest, network=network))
    state = TrainState.start(spec, model)
    starts = start_state(spec, run, state, origin)
    series = SeriesMeasurements(spec, build, data)
    with (
        closing(series),
        Training(
            spec,
            run,
            data,
            state=state,
            starts=starts,
            series=series,
            report=report,
            threads=threads,
        ) as training,
    ):
        training.run_to_the_end()
    measuring_costs = measure_run(spec, run, model, data=data, report=report)
    for name in run.seal():
        report("measure", 1, 1, f"sealed {name}")
    status = RunStatus.DIVERGED if state.diverged else RunStatus.DONE
    costs = {**state.costs(), **measuring_costs}
    run.write_manifest(
        replace(run.manifest, status=status, reason=state.ended, costs=costs)
    )


def _skip(run: RunDirectory, reason: str) -> None:
    """End a run that has nothing to start from; its tables stay empty."""
    for _ in run.seal():
        pass
    skipped = replace(run.manifest, status=RunStatus.SKIPPED, reason=reason)
    run.write_manifest(skipped)


def _on_device(splits: DataSplits, spec: RunSpec) -> dict[str, TensorPair]:
    device, dtype = spec.compute.device, _DTYPES[spec.compute.dtype]
    return {name: part.to(device, dtype) for name, part in splits.items()}


@contextmanager
def _failure_on_record(run: RunDirectory, report: ProgressReporter) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        # A full disk may refuse this too; the error itself is what counts.
        with suppress(StorageError):
            failed = replace(run.manifest, status=RunStatus.FAILED, reason=reason)
            run.write_manifest(failed)
        report("failed", 0, 1, reason)
        raise
