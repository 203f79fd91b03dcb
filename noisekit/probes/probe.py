"""The probe: one line in somebody's training loop, a reading per optimiser step."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import pandas as pd
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.mode import call_model, model_given_back
from noisekit.core.params import ParameterPatterns, layout_of, select_parameters
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import LossFn
from noisekit.noise.scale import ratio_of_averages
from noisekit.probes.assembly import (
    LossReduction,
    MicrobatchWeights,
    StepPosition,
    assemble,
)
from noisekit.probes.ghost import GhostReplay
from noisekit.probes.passes import StepRecord
from noisekit.probes.reading import Reading
from noisekit.probes.recorder import Recorder
from noisekit.probes.refusals import refuse_model, refuse_optimizer, refuse_options
from noisekit.probes.silence import silence

Estimator = Literal["auto", "per_example", "ghost"]
Sink = Callable[[Reading], object]
MAX_READINGS = 10_000


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loss_fn: LossFn | None = None,
    every: int | Callable[[int], bool] = 1,
    estimator: Estimator = "auto",
    ghost_batch: int | None = None,
    loss_reduction: LossReduction = "mean",
    microbatch_weights: MicrobatchWeights = "equal",
    batch_dim: int = 0,
    unit: Literal["example"] = "example",
    params: ParameterPatterns = None,
    scaler: "torch.amp.GradScaler | None" = None,
    exact_bits: bool = True,
    sinks: Iterable[Sink] = (),
) -> "Probe":
    """Read gradient and gradient noise at every optimiser step of a training loop.

    Attaching changes no bit of the training. Norms are read in the loop's own
    backward pass, before clipping, and a reading appears when the optimiser steps.

    Args:
        model: Trained by calling it; its first tensor input holds the batch.
        optimizer: Whose steps are read.
        loss_fn: Needed by ``estimator="ghost"`` and by ``measure``.
        every: Read each so many steps, starting with the first; or a function of the
            step's number.
        estimator: ``"per_example"`` raises where examples are coupled, as BatchNorm
            does in training mode; ``"auto"`` then reads the gradient only;
            ``"ghost"`` replays parts of the batch and reads their noise.
        ghost_batch: Examples of a ghost batch.
        loss_reduction: What the loss does over the batch.
        microbatch_weights: With accumulation of means: ``"equal"`` where each
            micro-batch has the same factor (``loss / k``), ``"by_size"`` where it has
            its share of the examples. They differ for unequal micro-batches only.
        batch_dim: Axis of the examples in the model's input.
        unit: What the noise is counted in.
        params: Names or patterns of the parameters to read; all by default.
        scaler: The loop's gradient scaler; a step that it skips gives no reading.
        exact_bits: Whether training must keep its bits; faster ways that round
            differently may be taken otherwise.
        sinks: Called with every reading.

    Raises:
        UsageError: If the model is compiled, distributed or scripted, or an option
            does not fit.
        NoParametersError: If there is nothing to read.
        DeviceMismatchError: If the parameters are on several devices.
    """
    refuse_model(model)
    refuse_optimizer(optimizer, model)
    refuse_options(
        every=every,
        estimator=estimator,
        loss_reduction=loss_reduction,
        microbatch_weights=microbatch_weights,
        unit=unit,
        ghost_batch=ghost_batch,
        loss_fn=loss_fn,
    )
    named = select_parameters(model, params)
    layout_of(named)  # refuses parameters on several devices
    recorder = Recorder(model, named, batch_dim=batch_dim)
    return Probe(
        recorder,
        optimizer,
        loss_fn=loss_fn,
        every=every,
        estimator=estimator,
        ghost_batch=ghost_batch,
        loss_reduction=loss_reduction,
        microbatch_weights=microbatch_weights,
        scaler=scaler,
        sinks=sinks,
    )


class Probe:
    """What ``attach`` returns: the readings of a training loop.

    Attributes:
        step: Optimiser steps taken.
        examples_seen: Examples that entered a gradient.
    """

    def __init__(
        self,
        recorder: Recorder,
        optimizer: torch.optim.Optimizer,
        *,
        loss_fn: LossFn | None,
        every: int | Callable[[int], bool],
        estimator: Estimator,
        ghost_batch: int | None,
        loss_reduction: LossReduction,
        microbatch_weights: MicrobatchWeights,
        scaler: "torch.amp.GradScaler | None",
        sinks: Iterable[Sink],
    ) -> None:
        self.step = 0
        self.examples_seen = 0
        self._recorder = recorder
        self._loss_fn = loss_fn
        self._every = every
        self._loss_reduction: LossReduction = loss_reduction
        self._microbatch_weights: MicrobatchWeights = microbatch_weights
        self._scaler = scaler
        self._sinks = tuple(sinks)
        self._at_the_end: list[Callable[[], object]] = []
        self._readings: deque[Reading] = deque(maxlen=MAX_READINGS)
        self._num_readings = 0
        self._ghosts: GhostReplay | None = None
        if estimator == "ghost" and loss_fn is not None and ghost_batch is not None:
            self._ghosts = GhostReplay(recorder, loss_fn, ghost_batch, loss_reduction)
        recorder.wanted.refuses_coupling = estimator == "per_example"
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._on_step)]
        if isinstance(loss_fn, nn.Module):
            self._handles.append(loss_fn.register_forward_hook(self._on_loss))
        self._prepare()

    # ------------------------------------------------------------------- the loop

    def _prepare(self) -> None:
        """Decide what the next step's passes are to record."""
        recorder, step = self._recorder, self.step + 1
        every = self._every
        wanted = every(step) if callable(every) else (step - 1) % every == 0
        ghost = self._ghosts is not None
        wants = recorder.wanted
        wants.gradient = bool(wanted)
        wants.examples = wants.gradient and not ghost
        wants.inputs = wants.gradient and ghost
        wants.closure = not recorder.verified or _check_is_due(self._num_readings)

    def _on_step(self, *_: object) -> None:
        """Commit what the step's backward passes have left."""
        record = self._recorder.take()
        self.step += 1
        self.examples_seen += record.num_examples
        if self._recorder.wanted.gradient and record.gradient is not None:
            reading = self._assembled(record, self._loss_scale())
            self._readings.append(reading)
            self._num_readings += 1
            for sink in self._sinks:
                sink(reading)
        self._prepare()

    def _loss_scale(self) -> Tensor | None:
        scaler = self._scaler
        if scaler is None or not scaler.is_enabled():
            return None
        return scaler._get_scale_async()  # get_scale() would synchronise

    def _assembled(self, record: StepRecord, loss_scale: Tensor | None) -> Reading:
        return assemble(
            record,
            StepPosition(self.step, self.examples_seen),
            self._recorder.plan.coverage(),
            loss_reduction=self._loss_reduction,
            microbatch_weights=self._microbatch_weights,
            loss_scale=loss_scale,
        )

    @property
    def loss_fn(self) -> LossFn:
        """The loss, to be called in the loop where ghost batches need the targets.

        A loss that is a module is watched where it is called; a plain function has to
        be called through this.

        Raises:
            UsageError: If ``attach`` was given none.
        """
        loss_fn = self._needed_loss_fn("probe.loss_fn")
        if isinstance(loss_fn, nn.Module):
            return loss_fn

        def observed(outputs: Any, targets: Any) -> Tensor:  # the user's own types
            if self._ghosts is not None:
                self._ghosts.observe(targets)
            return loss_fn(outputs, targets)

        return observed

    def _on_loss(self, module: object, args: tuple[Any, ...], loss: object) -> None:
        if self._ghosts is not None and len(args) > 1:
            self._ghosts.observe(args[1])

    # ------------------------------------------------------------------- readings

    @property
    def readings(self) -> list[Reading]:
        """The last readings, oldest first; at most 10,000 are kept."""
        return list(self._readings)

    def frame(self) -> pd.DataFrame:
        """Return the readings as a table, one row per step."""
        return pd.DataFrame([reading.row() for reading in self._readings])

    def simple_noise_scale(self, *, population_size: int | None = None) -> Estimate:
        """Return the simple noise scale over all kept readings [examples].

        A ratio of averages with Fieller's interval, errors by a block jackknife over
        steps. Weights move while training, so that this is an average over them.

        Args:
            population_size: Examples of the finite data set that batches are drawn
                from without replacement, if its own gradient is meant.
        """
        readings = [r for r in self._readings if r.moments is not None]
        parts = [
            part
            for r in readings
            if r.moments is not None
            for part in (r.moments.parts(population_size=population_size),)
            if part is not None
        ]
        if not parts:
            return Estimate(math.nan, status=Status.UNAVAILABLE)
        if len(parts) == 1:
            return parts[0].noise_scale().simple_noise_scale
        return ratio_of_averages(
            torch.tensor([p.variance_trace for p in parts], dtype=torch.float64),
            torch.tensor([p.debiased_grad_sq_norm for p in parts], dtype=torch.float64),
            weights=torch.tensor([float(r.batch_size) for r in readings]),
        ).simple_noise_scale

    def measure(self, inputs: Any, targets: Any) -> Reading:
        """Read a batch at the present weights, off the training path.

        The model is called in its present mode and given back bit for bit.

        Args:
            inputs: A tensor, a tuple or a mapping of arguments.
            targets: What the loss takes.

        Raises:
            UsageError: If ``attach`` was given no ``loss_fn``.
            BatchSizeError: If ghost batches do not fit into the batch.
        """
        loss_fn = self._needed_loss_fn("measure")
        model = self._recorder.model
        own = self._recorder.twin()
        with silence(own), model_given_back(model):
            try:
                own.wanted.inputs = self._ghosts is not None
                own.wanted.examples = self._ghosts is None
                record = _passed(own, model, loss_fn, inputs, targets)
                active = own.active
                if self._ghosts is not None and active is not None:
                    active.ghost = self._ghosts.moments(active, targets)
            finally:
                own.remove()
        return self._assembled(record, None)

    def _needed_loss_fn(self, caller: str) -> LossFn:
        if self._loss_fn is None:
            raise UsageError(
                f"{caller} needs the loss, got loss_fn=None; give it to attach()."
            )
        return self._loss_fn

    # ------------------------------------------------------------------- life span

    def detach(self) -> None:
        """Take every hook off; the readings stay."""
        self._recorder.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        while self._at_the_end:
            self._at_the_end.pop()()

    def add_sink(self, sink: Sink) -> None:
        """Have ``sink`` called with every reading from now on."""
        self._sinks = (*self._sinks, sink)

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

    def state_dict(self) -> dict[str, int | dict[str, str]]:
        """Return what a resumed run needs so that its readings go on as they would."""
        return {
            "step": self.step,
            "examples_seen": self.examples_seen,
            "num_readings": self._num_readings,
            "replayed": self._recorder.plan.replayed,
        }

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
        self.examples_seen = int(state["examples_seen"])
        self._num_readings = int(state["num_readings"])
        self._recorder.plan.replay(state["replayed"])
        self._prepare()


def _passed(
    recorder: Recorder, model: nn.Module, loss_fn: LossFn, inputs: Any, targets: Any
) -> StepRecord:
    """One forward and backward pass; again where a layer has to be read elsewhere."""
    while True:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.enable_grad():
            loss = loss_fn(call_model(model, inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
        record = recorder.take()
        if not recorder.plan.stale:
            return record


def _check_is_due(num_readings: int) -> bool:
    """At the first reading, the tenth, the hundredth: ever rarer, never never."""
    return num_readings < 1 or 10 ** round(math.log10(num_readings)) == num_readings
