"""Attach a probe whose readings go into a run directory."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from noisekit import probes
from noisekit.core.errors import NoisekitError
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import LossFn
from noisekit.probes.assembly import LossReduction, MicrobatchWeights
from noisekit.probes.probe import Estimator, Probe, Sink
from noisekit.records import RunSink


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
    save_to: Path | str | None = None,
    sinks: Iterable[Sink] = (),
) -> Probe:
    """Read gradient and gradient noise at every optimiser step of a training loop.

    As ``noisekit.probes.attach``, and with ``save_to`` every reading is also written
    to a run directory that ``nk.open_runs`` and ``noisekit report`` read, also while
    the loop goes on. Detaching the probe seals it.

    Args:
        model: Trained by calling it; its first tensor input holds the batch.
        optimizer: Whose steps are read.
        loss_fn: Needed by ``estimator="ghost"`` and by ``Probe.measure``.
        every: Read each so many steps, starting with the first; or a function of the
            step's number.
        estimator: ``"per_example"`` raises where examples are coupled, as BatchNorm
            does in training mode; ``"auto"`` then reads the gradient only;
            ``"ghost"`` replays parts of the batch and reads their noise.
        ghost_batch: Examples of a ghost batch.
        loss_reduction: What the loss does over the batch.
        microbatch_weights: With accumulation of means: ``"equal"`` where each
            micro-batch has the same factor, ``"by_size"`` where it has its share of
            the examples.
        batch_dim: Axis of the examples in the model's input.
        unit: What the noise is counted in.
        params: Names or patterns of the parameters to read; all by default.
        scaler: The loop's gradient scaler; a step that it skips gives no reading.
        exact_bits: Whether training must keep its bits.
        save_to: Run directory for the readings; made if it is not there.
        sinks: Called with every reading.
    """
    probe = probes.attach(
        model,
        optimizer,
        loss_fn=loss_fn,
        every=every,
        estimator=estimator,
        ghost_batch=ghost_batch,
        loss_reduction=loss_reduction,
        microbatch_weights=microbatch_weights,
        batch_dim=batch_dim,
        unit=unit,
        params=params,
        scaler=scaler,
        exact_bits=exact_bits,
        sinks=sinks,
    )
    if save_to is not None:
        _record(probe, save_to)
    return probe


def _record(probe: Probe, directory: Path | str) -> None:
    """Send the readings to a run directory; take the probe off if there is none."""
    try:
        recording = RunSink(directory)
    except NoisekitError:
        probe.detach()
        raise
    probe.add_sink(recording)
    probe.on_detach(recording.close)
