"""The probe: a reading per optimizer step of somebody's training loop."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from noisekit.core.arguments import checked
from noisekit.core.distributed import Ranks
from noisekit.core.errors import BatchSizeError, ProbeAdvice, UsageError
from noisekit.core.evaluation_mode import call_model
from noisekit.core.randomness import preserve_rng_state
from noisekit.core.results import Estimate
from noisekit.core.risk import LossFn
from noisekit.core.settings import PositiveInt
from noisekit.probes.advice import BatchSizeAdvice, advice_of
from noisekit.probes.capture.hooks import is_suspended, suspend_recording
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.replicas import ProbeJoin
from noisekit.probes.capture.step_record import StepRecord
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import NoiseEstimator
from noisekit.probes.estimators.estimator_set import EstimatorSet
from noisekit.probes.estimators.ghost import Ghost
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.history import ReadingHistory, Sink
from noisekit.probes.optimizer_steps import OptimizerSteps
from noisekit.probes.options import ProbeOptions
from noisekit.probes.ranks.examples_seen import ExamplesSeen, PendingReading
from noisekit.probes.ranks.sums import RankSums
from noisekit.probes.reading import Reading
from noisekit.probes.schedule import Overhead, Schedule, clock_of
from noisekit.probes.step_metrics.gradient_norms import GradHistogram, GradientNorms
from noisekit.probes.step_metrics.metric import StepMetric
from noisekit.probes.step_metrics.metric_set import MetricSet
from noisekit.probes.step_result import StepResult


class Probe:
    """The readings of a training loop, as returned by ``attach``.

    Attributes:
        step: Optimizer steps taken.
    """

    def __init__(
        self,
        recorder: Recorder,
        optimizer: torch.optim.Optimizer,
        options: ProbeOptions,
        estimators: Sequence[NoiseEstimator],
        metrics: Sequence[StepMetric],
    ) -> None:
        self.step = 0
        self._recorder = recorder
        self._options = options
        self._history = ReadingHistory(options.sinks)
        self._at_the_end: list[Callable[[], object]] = []
        self._lacking, self._has_advised = "", False
        recorder.on_unstepped = self._on_unstepped
        self._context = _context(recorder, optimizer, options, estimators)
        self._estimators = EstimatorSet(estimators, self._context)
        self._metrics = MetricSet(metrics, self._context)
        self._leave_compiled_calls()
        self._steps = OptimizerSteps(optimizer, recorder, options.scaler, self._on_step)
        device = recorder.parameters[0].device
        self._schedule = Schedule(options.every, options.budget, clock_of(device))
        sums = RankSums(
            len(recorder.names),
            self._estimators.names,
            options.loss_reduction,
            recorder.replicas.ranks.size,
            self._metrics.metrics,
        )
        self._seen = ExamplesSeen(recorder.replicas, sums, device)
        recorder.replicas.join(self._on_absent_step)
        self._handles: list[RemovableHandle] = []
        if isinstance(options.loss_fn, nn.Module):
            hook = options.loss_fn.register_forward_hook(self._on_loss_call)
            self._handles.append(hook)
        self._prepare()

    def __repr__(self) -> str:
        """Write how much was read, and what the last reading lacks."""
        lacking = f"; {self._lacking}" if self._lacking else ""
        taken, steps = self._history.num_taken, self.step
        return f"<Probe: {taken} readings in {steps} steps{lacking}>"

    def _leave_compiled_calls(self) -> None:
        """Replay compiled parts only where it was asked for: it is a second pass."""
        if self._recorder.opaque and not self._estimators.reads_calls:
            self._recorder.refuse_calls(
                "torch.compile keeps the calls of layers to itself; "
                "estimator='per_example' replays the compiled parts"
            )

    # ------------------------------------------------------------------- the loop

    def _prepare(self) -> None:
        """Decide what the next step's passes are to record."""
        recorder, taken = self._recorder, self._history.num_taken
        wanted = self._schedule.is_due(self.step + 1)
        self._estimators.request(recorder, wanted=wanted, num_readings=taken)
        self._metrics.request(wanted=wanted, num_readings=taken)
        split = not recorder.verified or _split_check_is_due(taken)
        recorder.wanted.split = split
        recorder.wanted.closure = split or taken % CHECK_EVERY == 0

    def _on_step(self) -> None:
        """Commit what the step's backward passes have left."""
        record = self._recorder.take()
        self.step += 1
        self._seen.add(record.num_examples)
        wanted = self._recorder.wanted.gradient
        if wanted:
            self._commit(record)
        self._schedule.step_ended(read=wanted)
        self._prepare()

    def _on_absent_step(self) -> None:
        """Take part in a step that other ranks take, without inputs of its own."""
        self.step += 1
        if self._recorder.wanted.gradient:
            self._seen.summed(None)
        self._prepare()

    def _commit(self, record: StepRecord) -> None:
        """Make a reading of the record, over all ranks, which wait for each other."""
        result: StepResult | None = None
        if record.gradient is not None:
            with self._faults_reported():
                result = self._result(record)
        found_inf = self._steps.found_inf
        pending: Reading | PendingReading | None = None
        if not self.ranks.alone:
            count = sum(self._context.weights_of(record).counts)
            pending = self._seen.summed(result, count=count, found_inf=found_inf)
        elif result is not None and found_inf is not None:
            pending = PendingReading(result=result, found_inf=found_inf)
        elif result is not None:
            with self._faults_reported():
                pending = result.reading()
        if pending is not None:
            self._history.add(pending)
        self._note_lacking(result)

    def _note_lacking(self, result: StepResult | None) -> None:
        """Warn once of a step whose noise is missing, or covers a part only."""
        if result is None:
            self._lacking = (
                "nothing was read: the parameters had no gradient when the optimizer "
                "stepped; step after backward(), and attach with the optimizer that "
                "is stepped"
            )
        else:
            self._lacking = result.lacking()
        if self._lacking and not self._recorder.plan.stale:  # else it tries another way
            self._advise(f"step {self.step}: {self._lacking}")

    def _on_unstepped(self) -> None:
        """Warn that gradients come and go without a step of the optimizer."""
        kind = type(self._steps.optimizer).__name__
        if self.step == 0:
            self._lacking = (
                f"gradients were zeroed again and again without a step of the {kind}; "
                "attach with the optimizer whose step() the loop calls, such as the "
                "one inside a wrapper"
            )
            self._advise(self._lacking)

    def _advise(self, text: str) -> None:
        """Warn, the first time only, and not of what was warned of as a fault."""
        if self._has_advised or self._recorder.faults.has_warned:
            return
        self._has_advised = True
        warnings.warn(f"{text}. Training goes on.", ProbeAdvice, stacklevel=2)

    @contextmanager
    def _faults_reported(self) -> Iterator[None]:
        """Report an error instead of stopping the training for it."""
        try:
            yield
        except Exception as error:
            self._recorder.faults.report(error)

    def _result(self, record: StepRecord) -> StepResult:
        """What the step has given on this rank."""
        step = StepInputs.of(record, self._context, self._steps.loss_scale)
        noise = self._estimators.noise(step)
        return StepResult(
            step=self.step,
            # Over several ranks the count of examples comes with the sums.
            examples_seen=self._seen.total if self.ranks.alone else 0,
            batch_size=record.num_examples,
            gradient=step.gradient,
            sizes=tuple(p.numel() for p in self._recorder.parameters),
            methods=step.methods,
            noise=noise,
            states=self._metrics.measure(step, noise.noise),
            unit=self._options.unit,
            tokens=self._estimators.tokens(step),
            clip_factor=self._steps.clip_factor,
            applied_factor=self._context.applied_factor(record),
            notes=self._steps.notes(),
        )

    @property
    def loss_fn(self) -> LossFn:
        """The loss, to be called in the loop where the probe needs the targets.

        A loss that is a module is watched where it is called; a plain function has to
        be called through this.

        Raises:
            UsageError: If ``attach`` was given none.
        """
        loss_fn = self._needed_loss_fn("probe.loss_fn")
        if isinstance(loss_fn, nn.Module):
            return loss_fn

        def observed(outputs: Any, targets: Any) -> Tensor:  # the user's own types
            loss = loss_fn(outputs, targets)
            self._on_loss(targets, loss)
            return loss

        return observed

    def _on_loss_call(self, _: object, args: tuple[Any, ...], loss: Tensor) -> None:
        if len(args) > 1:
            self._on_loss(args[1], loss)

    def _on_loss(self, targets: Any, loss: Tensor) -> None:
        """Look at the open pass before its backward pass, if it is to be read."""
        recorder = self._recorder
        if is_suspended(recorder) or not torch.is_grad_enabled():
            return
        try:
            self._metrics.on_loss(targets, loss)
            self._estimators.on_loss(recorder, targets)
        except Exception as error:  # the training is not to stop for it
            recorder.faults.note(error)
        if recorder.active is not None:
            recorder.active.inputs = None  # replays are done

    # ------------------------------------------------------------------- readings

    @property
    def examples_seen(self) -> int:
        """Examples that entered a gradient, on all ranks together.

        Between readings other ranks are taken to have seen as many as this one.
        """
        return self._seen.total

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model, all of which have the same readings."""
        return self._recorder.replicas.ranks

    @property
    def overhead(self) -> Overhead:
        """What the readings have cost, as far as steps without one tell."""
        return self._schedule.overhead()

    @property
    def joinable(self) -> ProbeJoin:
        """What goes into ``torch``'s ``Join`` after the model, for uneven inputs.

        Raises:
            UsageError: If the model is not distributed.
        """
        joinable = self._recorder.replicas.joinable
        if joinable is None:
            raise UsageError(
                "joinable needs a model in DistributedDataParallel, got one process; "
                "leave the probe out of Join."
            )
        return joinable

    @property
    def gradient_norms(self) -> GradientNorms:
        """How gradient norms are distributed over the run so far.

        Raises:
            UsageError: If ``"grad_histogram"`` is not among the probe's quantities.
        """
        for metric in self._metrics.metrics:
            if isinstance(metric, GradHistogram):
                return metric.norms
        raise UsageError(
            "gradient_norms needs quantities=('grad_histogram',), got others; "
            "name it in attach()."
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values of all step metrics that were asked for."""
        return tuple(n for metric in self._metrics.metrics for n in metric.columns())

    @property
    def readings(self) -> list[Reading]:
        """The last readings, oldest first; at most 10,000 are kept."""
        return self._history.kept()

    @property
    def last_reading(self) -> Reading | None:
        """The latest reading, whatever its step; ``None`` before the first."""
        return self._history.last()

    def frame(self) -> pd.DataFrame:
        """Return the readings as a table, one row per step."""
        return self._history.frame()

    @checked
    def simple_noise_scale(
        self,
        *,
        window: PositiveInt | None = None,
        estimator: str | None = None,
        population_size: PositiveInt | None = None,
    ) -> Estimate:
        """Return the simple noise scale over the last readings [examples].

        A ratio of averages with Fieller's interval, errors by a block jackknife over
        steps; unbounded where the signal is not resolved, never clamped. Weights move
        while training, so that this is an average over those of the window. Readings
        that are not finite, or cover other parameters than most, are left out; the
        estimate's note says how many, or why there is none.

        Args:
            window: How many readings count, the last one included; all that are kept
                by default.
            estimator: Which of those that were read side by side; the readings' own
                by default.
            population_size: Examples of the finite data set that batches are drawn
                from without replacement, if its own gradient is meant.

        Raises:
            UsageError: If ``window`` is not positive, or that estimator was not
                asked for.
        """
        self._estimators.check_asked(estimator)
        if window is not None and window < 1:
            raise UsageError(f"window needs to be 1 or more readings, got {window}.")
        return self._history.noise_scale(
            window=window, estimator=estimator, population_size=population_size
        )

    @checked
    def advise(
        self,
        *,
        window: PositiveInt | None = None,
        candidates: Sequence[float] | None = None,
    ) -> BatchSizeAdvice:
        """Return which batch size the readings support, and what limits that.

        The noise scale with its interval, and from it the steps and examples that
        training takes at candidate batch sizes, relative to the fewest possible.
        ``print`` it, draw it with ``nk.figures.batch_size_tradeoff(advice.table())``.

        Args:
            window: How many readings count, the last one included; all that are kept
                by default.
            candidates: Batch sizes to compare, beside the present one; powers of two
                around it and the noise scale by default.

        Raises:
            UsageError: If ``window`` or a candidate is not positive.
        """
        scale = self.simple_noise_scale(window=window)
        return advice_of(
            scale,
            self.readings[-window if window else None :],
            model=self._recorder.model,
            optimizer=self._steps.optimizer,
            candidates=candidates,
        )

    def measure(self, inputs: Any, targets: Any) -> Reading:
        """Read a batch at the present weights, off the training path.

        A copy of the model is called, in its present mode. With several ranks this
        one's batch is read alone; call it between steps then.

        Args:
            inputs: A tensor, a tuple or a mapping of arguments.
            targets: What the loss takes.

        Raises:
            UsageError: If ``attach`` was given no ``loss_fn``.
            BatchSizeError: If ghost batches do not fit into the batch.
        """
        loss_fn = self._needed_loss_fn("measure")
        own = self._recorder.twin()
        with suspend_recording(own), preserve_rng_state():
            try:
                self._estimators.install(own)
                record = _passed(own, loss_fn, inputs, targets)
                self._estimators.on_loss(own, targets)
            finally:
                own.remove()
        for fault in own.active.ghost_faults if own.active is not None else ():
            raise BatchSizeError(fault)
        step = StepInputs.of(record, replace(self._context, recorder=own), None)
        return StepResult(
            step=self.step,
            examples_seen=self.examples_seen,
            batch_size=record.num_examples,
            gradient=step.gradient,
            sizes=tuple(p.numel() for p in own.parameters),
            methods=step.methods,
            noise=self._estimators.noise(step),
            states={},
            unit=self._options.unit,
            tokens=self._estimators.tokens(step),
        ).reading()

    def _needed_loss_fn(self, caller: str) -> LossFn:
        if self._options.loss_fn is None:
            raise UsageError(
                f"{caller} needs the loss, got loss_fn=None; give it to attach()."
            )
        return self._options.loss_fn

    # ------------------------------------------------------------------- life span

    def detach(self) -> None:
        """Take every hook off; the readings stay."""
        self._recorder.remove()
        self._steps.remove()
        self._metrics.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        while self._at_the_end:
            self._at_the_end.pop()()

    @checked
    def add_sink(self, sink: Sink) -> None:
        """Have ``sink`` called with every reading from now on."""
        self._history.add_sink(sink)

    @checked
    def on_detach(self, close: Callable[[], object]) -> None:
        """Have ``close`` called once, when the probe is taken off, such as a sink's."""
        self._at_the_end.append(close)

    def __enter__(self) -> Self:
        """Return the probe itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def state_dict(self) -> dict[str, Any]:  # plain values that JSON can hold
        """Return what a resumed run needs so that its readings go on as they would."""
        return {
            "step": self.step,
            "examples_seen": self.examples_seen,
            "num_readings": self._history.num_taken,
            "replayed": self._recorder.plan.replayed,
            "left_out": self._recorder.plan.named_left_out,
            "noise": self._estimators.state_dict(),
            "quantities": self._metrics.state_dict(),
        }

    @checked
    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # parsed from a file
        """Go on where the probe that gave ``state`` was.

        Raises:
            UsageError: If ``state`` is not a probe's.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise UsageError(
                "load_state_dict needs what state_dict gave, got a state without "
                f"{', '.join(sorted(missing))}."
            )
        self.step = int(state["step"])
        self._seen.restart(int(state["examples_seen"]))
        self._history.num_taken = int(state["num_readings"])
        self._recorder.plan.replay(state["replayed"], left_out=state["left_out"])
        self._estimators.load_state_dict(state["noise"])
        self._metrics.load_state_dict(state["quantities"])
        if self.step > 0:
            self._metrics.resume()
        self._prepare()


def _context(
    recorder: Recorder,
    optimizer: torch.optim.Optimizer,
    options: ProbeOptions,
    estimators: Sequence[NoiseEstimator],
) -> ProbeContext:
    """What the estimators and metrics are set up with."""
    replays = any(isinstance(estimator, Ghost) for estimator in estimators)
    return ProbeContext(
        recorder=recorder,
        optimizer=optimizer,
        loss_fn=options.loss_fn,
        loss_reduction=options.loss_reduction,
        microbatch_weights=options.microbatch_weights,
        example_weights=options.example_weights,
        scaled=options.scaler is not None,
        unit=options.unit,
        tokens=options.tokens,
        ghost_batch=options.ghost_batch if replays else None,
        generator=options.generator or torch.Generator().manual_seed(0),
    )


def _passed(
    recorder: Recorder, loss_fn: LossFn, inputs: Any, targets: Any
) -> StepRecord:
    """One forward and backward pass; again where a layer has to be read elsewhere."""
    while True:
        for parameter in recorder.model.parameters():
            parameter.grad = None
        with torch.enable_grad():
            loss = loss_fn(call_model(recorder.model, inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
        record = recorder.take()
        if not recorder.plan.stale:
            return record


CHECK_EVERY = 100
"""Readings between two checks that contributions add up to the gradient, each at the
cost of about one more gradient: 0.3 % of a step's time per reading."""


def _split_check_is_due(num_readings: int) -> bool:
    """Whether to add up single examples' gradients: on readings 1, 11, 101, ..."""
    return num_readings < 1 or 10 ** round(math.log10(num_readings)) == num_readings
