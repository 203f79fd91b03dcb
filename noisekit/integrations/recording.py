"""Attach a probe whose readings may go into a run directory or a text file."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from noisekit.core.arguments import checked
from noisekit.core.errors import NoisekitError, UsageError
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import LossFn
from noisekit.core.vocabulary import QUANTITIES
from noisekit.probes.attachment import attach_probe
from noisekit.probes.capture.example_weights import ExampleWeights
from noisekit.probes.capture.hooks import OnError
from noisekit.probes.capture.step_weights import LossReduction, MicrobatchWeights
from noisekit.probes.capture.tokens import TokenCounts
from noisekit.probes.history import Sink
from noisekit.probes.options import Estimator, Metric, ProbeOptions, Unit
from noisekit.probes.probe import Probe
from noisekit.records import TEXT_SINKS, RunSink


def _documented(attach: Callable[..., Probe]) -> Callable[..., Probe]:
    """Put the descriptions of the options, written once, in front of ``save_to``."""
    options = inspect.getdoc(ProbeOptions) or ""
    listed = options.partition("Attributes:\n")[2].rstrip()
    text = inspect.getdoc(attach) or ""
    attach.__doc__ = text.replace("    save_to:", f"{listed}\n    save_to:", 1)
    return attach


def attach(  # noqa: D417 - ProbeOptions describes the options
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loss_fn: LossFn | None = None,
    every: int | Callable[[int], bool] = 1,
    estimator: Estimator | tuple[Estimator, ...] = "auto",
    row_share: float = 0.25,
    num_chunks: int = 4,
    num_signs: int = 1,
    calibrate_every: int | None = None,
    generator: torch.Generator | None = None,
    ghost_batch: int | None = None,
    example_weights: ExampleWeights | None = None,
    loss_reduction: LossReduction = "mean",
    microbatch_weights: MicrobatchWeights = "equal",
    batch_dim: int = 0,
    unit: Unit = "example",
    tokens: TokenCounts | None = None,
    params: ParameterPatterns = None,
    scaler: "torch.amp.GradScaler | None" = None,
    exact_bits: bool = True,
    on_error: OnError = "warn",
    quantities: Metric | Iterable[Metric] = (),
    hessian_every: int = 100,
    budget: float | None = None,
    repeatable: bool = False,
    sinks: Iterable[Sink] = (),
    save_to: Path | str | None = None,
) -> Probe:
    """Read gradient and gradient noise at every optimizer step of a training loop.

    Attaching changes no bit of the training. Norms are read in the loop's own backward
    pass, before clipping, and a reading appears when the optimizer steps. The options
    are the fields of :class:`noisekit.probes.ProbeOptions`.

    Args:
        model: Trained by calling it; its first tensor input holds the batch. It may be
            wrapped in ``DistributedDataParallel``; attach to the wrapper then, on
            every rank. It may be compiled: attach to what ``torch.compile`` returned.
        optimizer: Whose steps are read. A step with a closure is read at its last
            evaluation. Of several optimizers each has a probe of its own.
        save_to: Run directory for the readings, which ``nk.open_runs`` and ``noisekit
            report`` read, also while the loop goes on; made if it is not there, and
            sealed by detaching. A name that ends in ``.csv`` or ``.jsonl`` is a text
            file instead, which other programs read. Of several ranks the first writes.

    Raises:
        UsageError: If hooks would be silent on the model or see a part of it only, as
            where it is sharded or scripted, or if an option does not fit.
        NoParametersError: If there is nothing to read.
        DeviceMismatchError: If the parameters are on several devices.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with nk.attach(model, optimizer, every=2) as probe:
        ...     for _ in range(4):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(8, 3)).mean().backward()
        ...         optimizer.step()
        >>> [reading.step for reading in probe.readings]
        [1, 3]
    """
    given = dict(locals())
    _check_place(save_to=save_to)
    options = ProbeOptions(**{f.name: given[f.name] for f in fields(ProbeOptions)})
    probe = attach_probe(model, optimizer, options)
    if save_to is not None and probe.ranks.rank == 0:
        _record(probe, save_to)
    return probe


_documented(attach)


@checked
def _check_place(*, save_to: Path | str | None) -> None:
    """Check the type of a path, before hooks are set."""


def _record(probe: Probe, path: Path | str) -> None:
    """Send the readings to a file or directory; detach the probe if there is none."""
    text_sink = TEXT_SINKS.get(Path(path).suffix)
    try:
        if text_sink is None:
            _check_columns(probe)
        recording = RunSink(path) if text_sink is None else text_sink(path)
    except NoisekitError:
        probe.detach()
        raise
    probe.add_sink(recording)
    probe.on_detach(recording.close)


def _check_columns(probe: Probe) -> None:
    """Check that a run's table has a column for every quantity.

    Raises:
        UsageError: If the user's own step metric has none.
    """
    unknown = [name for name in probe.columns if name not in QUANTITIES]
    if unknown:
        raise UsageError(
            f"a run directory needs quantities of the vocabulary, got "
            f"{', '.join(unknown)}; write to a file that ends in .jsonl or .csv."
        )
