"""The training loop of one run."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from noisekit.core.randomness import stream
from noisekit.core.risk import LossFn
from noisekit.integrations import attach
from noisekit.probes import Probe
from noisekit.records import RunDirectory
from noisekit.train.data.batch_order import BatchOrder
from noisekit.train.data.datasets import TensorPair
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.checkpoint import load_checkpoint, save_checkpoint
from noisekit.train.runs.evaluate import Evaluation, evaluate, evaluation_steps
from noisekit.train.runs.optimizers import learning_rate_at
from noisekit.train.runs.progress import ProgressReporter
from noisekit.train.runs.recording import Recorder
from noisekit.train.runs.snapshots import (
    candidate,
    crossed_snapshots,
    planned_snapshots,
    save_weights,
)
from noisekit.train.runs.state import (
    Candidate,
    Captured,
    Row,
    TrainState,
    capture,
    restore,
)

_MAX_UNCHECKED = 256
"""Updates after which batch losses are looked at, whatever else is due."""


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
        report: ProgressReporter,
        threads: int,
    ) -> None:
        self._spec = spec
        self._run = run
        self._data = data
        self._state = state
        self._report = report
        self._threads = threads
        self._start = state.vector()
        self._order = BatchOrder(
            spec, num_examples=len(data["train"]), device=spec.compute.device
        )
        self._evaluations = evaluation_steps(spec)
        self._planned = planned_snapshots(spec)
        self._evaluated: tuple[int, Evaluation] | None = None
        self._unchecked: list[Tensor] = []
        self._loss_fn: LossFn = cross_entropy

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
            self._probe = self._attached(stack)
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
        """Open the tables after the rows that belong to the checkpoint."""
        return Recorder(
            self._run,
            captured.num_rows if captured else {},
            num_examples=len(self._data["train"]),
            layers=self._spec.probe.layers,
        )

    def _attached(self, stack: ExitStack) -> Probe | None:
        """Attach the probe, if the recipe asks for one."""
        wanted = self._spec.probe
        if wanted.every == 0:
            return None
        replays = "ghost" in wanted.estimator
        probe = attach(
            self._state.model,
            self._state.optimizer,
            loss_fn=cross_entropy if replays else None,
            every=wanted.every,
            estimator=wanted.estimator,
            row_share=wanted.row_share,
            num_chunks=wanted.num_chunks,
            num_signs=wanted.num_signs,
            generator=stream(self._spec.seed, "probe"),
            ghost_batch=wanted.ghost_batch,
            microbatch_weights="by_size",
            sinks=(self._recorder.record,),
        )
        if replays:  # where the loss is called, a batch's targets are at hand
            self._loss_fn = probe.loss_fn
        return stack.enter_context(probe)

    def run_to_the_end(self) -> None:
        """Train until a stop rule holds or the loss is no longer finite."""
        state, every = self._state, self._spec.compute.checkpoint_updates
        began = time.monotonic() - state.seconds
        if state.step == 0:
            self._observe()
        while not state.ended:
            self._update()
            self._observe()
            if state.ended or state.step % every == 0:
                state.seconds = time.monotonic() - began
                self._checkpoint()

    def _update(self) -> None:
        """Take one optimiser step."""
        state, train = self._state, self._data["train"]
        rate = learning_rate_at(self._spec, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        chosen = self._order.indices(state.step)
        parts = chosen.chunk(self._spec.training.accumulation)
        state.optimizer.zero_grad()
        losses = []
        for part in parts:
            outputs = state.model(train.inputs.index_select(0, part))
            loss = self._loss_fn(outputs, train.targets.index_select(0, part))
            if len(parts) > 1:
                loss = loss * (len(part) / len(chosen))
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        batch_loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self._recorder.expect(learning_rate=rate, batch_loss=batch_loss)
        state.optimizer.step()
        state.step += 1
        state.examples_seen += len(chosen)
        self._unchecked.append(batch_loss)

    def _observe(self) -> None:
        """Do whatever is due at this step: check, evaluate, keep weights, stop."""
        state, step = self._state, self._state.step
        regular, last = step in self._evaluations, step >= self._spec.max_updates
        if not (regular or last or self._is_looked_at(step)):
            return
        if self._batch_loss_left_the_numbers():
            return
        if regular or last:
            self._record_evaluation()
        if regular and not state.ended:
            self._follow_training_loss()
        if last and not state.ended:
            state.ended = f"took the {step} updates that training.stop allows"
        if not state.diverged:
            self._take_planned()

    def _is_looked_at(self, step: int) -> bool:
        """Whether the batch losses are to be checked, apart from evaluations."""
        saved = step % self._spec.compute.checkpoint_updates == 0
        return saved or step in self._planned or len(self._unchecked) >= _MAX_UNCHECKED

    def _take_planned(self) -> None:
        for name, kind in self._planned.get(self._state.step, ()):
            self._take_now(name, kind)
        if self._state.ended:
            self._take_now("final", "final")

    def _batch_loss_left_the_numbers(self) -> bool:
        """Look at the batch losses since the last look, all at once."""
        state, losses = self._state, self._unchecked
        if not losses:
            return False
        first = state.step - len(losses) + 1
        values: list[float] = torch.stack(losses).tolist()
        losses.clear()
        for update, value in enumerate(values, start=first):
            if not math.isfinite(value):
                state.ended = f"the batch loss was {value} at update {update}"
                state.diverged = True
                return True
        return False

    def _record_evaluation(self) -> None:
        state, found = self._state, self._evaluation()
        self._recorder.append("evaluations", {**self._position(), **found.scores})
        self._report(
            "train",
            state.step,
            self._spec.max_updates,
            f"training loss {found.train_loss:.3g}",
        )
        if not found.finite:
            state.ended = (
                f"the training loss was {found.train_loss} after update {state.step}"
            )
            state.diverged = True

    def _follow_training_loss(self) -> None:
        """Bring crossings and the stop rules up to a regular evaluation."""
        state, found = self._state, self._evaluation()
        stop = self._spec.training.stop
        for name, kept in crossed_snapshots(state, self._place(), found):
            self._take(name, kept)
        stalled = self._newly_stalled(found.train_loss)
        if "snapshot" in stalled:
            self._take_now("stalled", "stalled")
        if "stop" in stalled:
            state.ended = f"the training loss stalled at {found.train_loss:.4g}"
        if stop.train_loss is not None and found.train_loss <= stop.train_loss:
            state.ended = f"the training loss reached {stop.train_loss:g}"

    def _newly_stalled(self, train_loss: float) -> list[str]:
        """Bring the watches up to an evaluation; return whose patience has run out."""
        state = self._state
        epoch = state.examples_seen / len(self._data["train"])
        found = []
        for name, before in state.stalls.items():
            after = before.after(train_loss, epoch=epoch)
            state.stalls[name] = after
            if after.stalled and not before.stalled:
                found.append(name)
        return found

    def _evaluation(self) -> Evaluation:
        """Return the evaluation at this step, done once."""
        if self._evaluated is None or self._evaluated[0] != self._state.step:
            found = evaluate(
                self._state.model,
                self._data,
                start=self._start,
                batch_size=self._spec.evaluation.batch_size,
            )
            self._evaluated = (self._state.step, found)
        return self._evaluated[1]

    def _take_now(self, name: str, kind: str) -> None:
        """Take the snapshot ``name`` of the present weights."""
        now = candidate(
            self._state, self._place(), self._evaluation(), name=name, kind=kind
        )
        self._take(name, now)

    def _take(self, name: str, kept: Candidate) -> None:
        facts = {"run_id": self._spec.run_id, "step": str(kept.row["step"])}
        save_weights(self._run.snapshots, name, kept.weights, facts)
        self._recorder.append("snapshots", kept.row)
        self._state.taken.append(name)

    def _position(self) -> Row:
        """Return where in training the present weights are."""
        seen = self._state.examples_seen
        return {
            "step": self._state.step,
            "examples_seen": seen,
            "epoch": seen / len(self._data["train"]),
        }

    def _place(self) -> Row:
        """Return the position with the rate that led there."""
        rate = learning_rate_at(self._spec, max(0, self._state.step - 1))
        return {**self._position(), "learning_rate": rate}

    def _checkpoint(self) -> None:
        """Save the state; its rows are durable before it is."""
        state, spec = self._state, self._spec
        state.num_rows = self._recorder.flush()
        self._report("train", state.step, spec.max_updates, "rows are durable")
        captured = capture(state, self._probe)
        save_checkpoint(
            self._run.checkpoints, captured, spec=spec, threads=self._threads
        )
        self._report("train", state.step, spec.max_updates, "checkpoint saved")

    def _has_rows_of(self, captured: Captured) -> bool:
        """Whether the tables still have the rows that belong to a checkpoint."""
        return all(
            self._run.read(name).rows.num_rows >= count
            for name, count in captured.num_rows.items()
        )
