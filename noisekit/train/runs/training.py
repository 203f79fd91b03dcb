"""The training loop of one run."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from noisekit.records import RunDirectory
from noisekit.train.data.section import TensorPair
from noisekit.train.recipes.clock import Horizon, Position, Span
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.sections import SPLITS
from noisekit.train.recipes.update_plan import PlannedUpdate, UpdatePlan
from noisekit.train.runs.agenda import Agenda
from noisekit.train.runs.checkpoint import load_checkpoint, save_checkpoint
from noisekit.train.runs.evaluate import Evaluation, evaluate
from noisekit.train.runs.observations import Observations
from noisekit.train.runs.probing import attach_probe
from noisekit.train.runs.progress import ProgressReporter
from noisekit.train.runs.recording import Recorder
from noisekit.train.runs.series import SeriesMeasurements
from noisekit.train.runs.snapshots import (
    candidate,
    crossed_snapshots,
    save_optimizer,
    save_weights,
)
from noisekit.train.runs.state import (
    PHASE,
    STOP,
    Candidate,
    Captured,
    Row,
    TrainState,
    capture,
    restore,
)
from noisekit.train.runs.updates import Updates
from noisekit.train.section import Split

_MAX_UNCHECKED = 256
"""Updates after which batch losses are checked, whatever else is due."""


class Training:
    """One run's training: what stays fixed, beside the state that changes.

    On entry the newest checkpoint, if there is one, is taken over.
    """

    def __init__(
        self,
        spec: RunSpec,
        run: RunDirectory,
        data: Mapping[str, TensorPair],
        *,
        state: TrainState,
        starts: Mapping[str, Tensor],
        series: SeriesMeasurements,
        report: ProgressReporter,
        threads: int,
    ) -> None:
        self._spec = spec
        self._run = run
        self._data = data
        self._state = state
        self._report = report
        self._threads = threads
        self._starts = starts
        self._clock = spec.clock
        self._max_updates = spec.max_updates
        self._loss = spec.training.find_loss()
        self._series = series
        self._plan = UpdatePlan(spec)
        state.plan = self._plan.start()
        self._observations = Observations(
            self._plan.needs, adaptive=self._plan.adaptive
        )
        self._agenda = self._planned()
        self._quiet = Horizon(Position(), 0, 0)
        self._checkpoints = Span(updates=spec.compute.checkpoint_updates)
        # The rate of the last update; that of the first one before it.
        _, self._last = self._plan.next(state.plan, state.position)
        self._recorded = -1
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._unchecked: list[Tensor] = []

    def _planned(self) -> Agenda:
        """Return what is due at places that are known in advance, in this order."""
        agenda = Agenda()
        agenda.every(self._clock.span(self._spec.evaluation.every), self._follow)
        agenda.once(self._clock.end, self._end)
        for name, point in self._spec.snapshot_points.items():
            for kind, place in point.clock_points.items():
                take = partial(self._take_now, name, kind)
                agenda.once(self._clock.span(place), take)
        for section in self._spec.series:
            measure = partial(self._measure, section.measures)
            agenda.every(self._clock.span(section.every), measure)
        return agenda

    def __enter__(self) -> Self:
        """Take the newest checkpoint over, open the tables, attach the probe."""
        found = load_checkpoint(
            self._run.checkpoints,
            spec=self._spec,
            threads=self._threads,
            usable=self._has_rows_of,
        )
        for fault in found.faults:
            self._run.add_fault(fault)
        with ExitStack() as stack:
            self._recorder = stack.enter_context(self._opened(found.captured))
            self._probe, loss_fn = attach_probe(
                self._spec,
                self._state,
                self._loss,
                observations=self._observations,
                sink=self._recorder.record,
            )
            if self._probe is not None:
                stack.enter_context(self._probe)
            self._updates = Updates(self._spec, self._data["train"], loss_fn)
            if found.captured:
                restore(self._state, self._probe, found.captured)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach the probe and close the tables."""
        self._stack.__exit__(kind, error, trace)

    def _opened(self, captured: Captured | None) -> Recorder:
        """Open the tables after the rows that belong to the checkpoint.

        Measurements of a run that has been trained are not those of its series alone.
        """
        trained = captured is not None and captured.ended
        return Recorder(
            self._run,
            captured.num_rows if captured else {},
            layers=self._spec.probe.layers,
            series=bool(self._spec.series) and not trained,
        )

    def run_to_the_end(self) -> None:
        """Train until a stop rule holds or the loss is no longer finite."""
        state = self._state
        self._began = time.monotonic() - state.seconds
        if state.position == Position():
            self._begin()
        while not state.ended:
            self.advance()

    def advance(self) -> None:
        """Take one update, and do what is due after it."""
        before = self._state.position
        self._update()
        self._do_what_is_due(before)

    def _begin(self) -> None:
        """Evaluate and keep the starting weights."""
        self._follow()
        if not self._state.diverged:
            self._take_now("start", "start")
            for section in self._spec.series:
                self._measure(section.measures)
            self._take_final()

    def _update(self) -> None:
        """Take one optimizer step as planned, and advance the clock."""
        state, planned = self._state, self._next_update()
        batch_loss = self._updates.gradient(state, planned)
        self._last = planned
        self._recorder.expect(
            epoch=self._clock.epochs(planned.after),
            learning_rate=planned.learning_rate,
            batch_loss=batch_loss,
        )
        state.optimizer.step()
        state.position = planned.after
        state.observed = self._observations.of(planned, batch_loss, self._probe)
        self._unchecked.append(batch_loss)

    def _next_update(self) -> PlannedUpdate:
        """Return what the next update does; a phase may begin with it."""
        state, phase = self._state, self._state.plan.phase
        state.plan, planned = self._plan.next(
            state.plan,
            state.position,
            observed=state.observed,
            reached=state.phase_reached,
        )
        if state.plan.phase != phase:
            later = self._spec.phases[state.plan.phase :]
            state.watch(PHASE, later[0].at if later else None)
        return planned

    def _do_what_is_due(self, before: Position) -> None:
        """Check losses, act on the agenda, save, as far as due since ``before``."""
        state = self._state
        if self._quiet.covers(state.position) and len(self._unchecked) < _MAX_UNCHECKED:
            return
        self._quiet = self._agenda.quiet_from(state.position, self._checkpoints)
        due = self._agenda.due(before, state.position)
        save = self._checkpoints.due(before, state.position)
        if not (due or save or len(self._unchecked) >= _MAX_UNCHECKED):
            return
        self._check_batch_losses()
        for action in due:
            if not state.diverged:
                action()
        self._take_final()
        if save or state.ended:
            state.seconds = time.monotonic() - self._began
            self._checkpoint()

    def _end(self) -> None:
        """End the run where ``training.stop`` allows no further update."""
        self._record_evaluation()
        if not self._state.ended:
            updates = self._state.position.updates
            self._state.ended = f"took the {updates} updates that training.stop allows"

    def _take_final(self) -> None:
        if self._state.ended and not self._state.diverged:
            self._take_now("final", "final")

    def _check_batch_losses(self) -> None:
        """End the run at the first batch loss since the last check that is no number.

        All are transferred from the device at once.
        """
        state, losses = self._state, self._unchecked
        if not losses:
            return
        first = state.position.updates - len(losses) + 1
        values: list[float] = torch.stack(losses).tolist()
        losses.clear()
        for update, value in enumerate(values, start=first):
            if not math.isfinite(value):
                state.ended = f"the batch loss was {value} at update {update}"
                state.diverged = True
                return

    def _record_evaluation(self) -> None:
        """Write the evaluation at this step, unless it has been written."""
        state = self._state
        if self._recorded == state.position.updates:
            return
        self._recorded = state.position.updates
        found = self._evaluation(self._spec.evaluation.splits)
        self._recorder.append("evaluations", {**self._position(), **found.scores})
        self._report_step(found.headline)
        if found.fault:
            state.ended = f"{found.fault} after update {state.position.updates}"
            state.diverged = True

    def _follow(self) -> None:
        """Evaluate, and bring crossings, stalls and the stop rules up to date."""
        self._record_evaluation()
        state = self._state
        if state.ended or "train" not in self._spec.evaluation.splits:
            return
        train_loss = self._evaluation(("train",)).train_loss
        if self._observations.evaluations:
            state.observed["evaluation_loss"] = train_loss
        for name, kept in crossed_snapshots(
            state, self._place(), train_loss, self._evaluation
        ):
            self._take(name, kept)
        stalled = self._newly_stalled(train_loss)
        for name in stalled:
            if name not in {STOP, PHASE}:
                self._take_now(name, "stalled")
        if STOP in stalled:
            state.ended = f"the training loss stalled at {train_loss:.4g}"
        self._newly_crossed(PHASE, train_loss)
        if self._newly_crossed(STOP, train_loss):
            level = state.crossings[STOP].level
            state.ended = f"the training loss reached {level:g}"

    def _newly_crossed(self, name: str, train_loss: float) -> bool:
        """Bring one crossing, if it is watched, up to an evaluation."""
        crossings = self._state.crossings
        if name not in crossings:
            return False
        crossings[name], meaning = crossings[name].after(train_loss)
        return meaning == "sustained"

    def _newly_stalled(self, train_loss: float) -> list[str]:
        """Bring the watches up to an evaluation; return whose patience has run out."""
        state = self._state
        epoch = self._clock.epochs(state.position)
        found = []
        for name, before in state.stalls.items():
            after = before.after(train_loss, epoch=epoch)
            state.stalls[name] = after
            if after.stalled and not before.stalled:
                found.append(name)
        return found

    def _evaluation(self, splits: Sequence[Split] = SPLITS) -> Evaluation:
        """Return the evaluation at this step on parts of the data, each done once."""
        step = self._state.position.updates
        if self._evaluated[0] != step:
            self._evaluated = (step, {})
        scores = self._evaluated[1]
        missing = [name for name in splits if f"{name}_loss" not in scores]
        if missing:
            found = evaluate(
                self._state.model,
                {name: self._data[name] for name in missing},
                self._loss,
                starts=self._starts,
                batch_size=self._spec.evaluation.batch_size,
            )
            scores.update(found.scores)
        return Evaluation(scores).of(splits)

    def _measure(self, measures: Sequence[str]) -> None:
        """Take measures of the present weights, which are not kept."""
        for name in measures:
            for row in self._series.rows(
                name,
                self._state.model,
                step=self._state.position.updates,
                learning_rate=self._last.learning_rate,
                phase=self._state.plan.phase,
            ):
                self._recorder.append("measurements", row)
            self._report_step(f"measured {name}")

    def _take_now(self, name: str, kind: str) -> None:
        """Take the snapshot ``name`` of the present weights, if not taken before."""
        if name in self._state.taken:
            return
        now = candidate(
            self._state, self._place(), self._evaluation(), name=name, kind=kind
        )
        self._take(name, now)

    def _take(self, name: str, kept: Candidate) -> None:
        facts = {"run_id": self._spec.run_id, "step": str(kept.row["step"])}
        save_weights(self._run.snapshots, name, kept.weights, facts)
        if kept.optimizer is not None:
            save_optimizer(self._run.optimizers, name, kept.optimizer, facts)
        self._recorder.append("snapshots", kept.row)
        self._state.candidates.pop(name, None)
        self._state.taken.append(name)

    def _position(self) -> Row:
        """Return where in training the present weights are."""
        position = self._state.position
        place: Row = {
            "step": position.updates,
            "examples_seen": position.examples,
            "epoch": self._clock.epochs(position),
        }
        if self._spec.phases:
            place["phase"] = self._state.plan.phase
        if self._plan.varies:
            place["batch_size"] = self._last.num_examples
        return place

    def _place(self) -> Row:
        """Return the position with the rate that led there."""
        return {**self._position(), "learning_rate": self._last.learning_rate}

    def _checkpoint(self) -> None:
        """Save the state; its rows are durable before it is."""
        state, spec = self._state, self._spec
        state.num_rows = self._recorder.flush()
        self._report_step("rows are durable")
        captured = capture(state, self._probe)
        save_checkpoint(
            self._run.checkpoints, captured, spec=spec, threads=self._threads
        )
        self._report_step("checkpoint saved")

    def _report_step(self, detail: str) -> None:
        step = self._state.position.updates
        self._report("train", step, self._max_updates, detail)

    def _has_rows_of(self, captured: Captured) -> bool:
        """Whether the tables still have the rows that belong to a checkpoint."""
        return all(
            self._run.read(name).rows.num_rows >= count
            for name, count in captured.num_rows.items()
        )
