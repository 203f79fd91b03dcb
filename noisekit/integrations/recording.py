"""Attach a probe whose readings go into a run directory or a text file."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from noisekit import probes
from noisekit.core.errors import NoisekitError
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import LossFn
from noisekit.core.vocabulary import QuantityName
from noisekit.probes.capture.example_weights import ExampleWeights
from noisekit.probes.capture.hooks import OnError
from noisekit.probes.capture.tokens import TokenCounts
from noisekit.probes.estimators.assembly import LossReduction, MicrobatchWeights
from noisekit.probes.estimators.choice import Estimator, Unit
from noisekit.probes.options import Sink
from noisekit.probes.probe import Probe
from noisekit.records import TEXT_SINKS, RunSink


def attach(
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
    quantities: QuantityName | Iterable[QuantityName] = (),
    hessian_every: int = 100,
    budget: float | None = None,
    repeatable: bool = False,
    save_to: Path | str | None = None,
    sinks: Iterable[Sink] = (),
) -> Probe:
    """Read gradient and gradient noise at every optimiser step of a training loop.

    As ``noisekit.probes.attach``, and with ``save_to`` every reading is also written
    to a run directory that ``nk.open_runs`` and ``noisekit report`` read, also while
    the loop goes on; detaching the probe seals it. Or it is written to a text file.

    Args:
        model: Trained by calling it; its first tensor input holds the batch. It may be
            wrapped in ``DistributedDataParallel``; attach to the wrapper then, on
            every rank. It may be compiled: attach to what ``torch.compile`` returned.
        optimizer: Whose steps are read. A step with a closure is read at its last
            evaluation.
        loss_fn: Needed by ``estimator="ghost"`` and by ``measure``.
        every: Read each so many steps, starting with the first; or a function of the
            step's number, the same on every rank.
        estimator: How the noise is read, or several names to read side by side on
            each step; the first is the reading's own. ``"per_example"``, and cheaper
            ``"rows"`` and ``"chunks"``, raise where examples are coupled, as
            BatchNorm does in training mode. ``"accumulation"`` and ``"ranks"``
            compare micro-batches and processes, whatever the model; ``"ghost"``
            replays parts of the batch. ``"random_signs"`` takes one more backward
            pass. ``"norm_layers"`` is a proxy. ``"preconditioned"`` adds Adam's noise
            to another. ``"auto"`` takes per-example, else accumulation, else ranks.
        row_share: Share of the examples that ``"rows"`` draws at random.
        num_chunks: Parts of the batch for ``"chunks"``.
        num_signs: Extra backward passes for ``"random_signs"``.
        calibrate_every: Readings from one full reading to the next by which
            ``"norm_layers"`` is calibrated; not at all by default.
        generator: Draws rows and signs, on the CPU; one seeded with 0 by default.
            Its state is part of the probe's.
        ghost_batch: Examples of a ghost batch.
        example_weights: Given a micro-batch's targets, what each example counts in
            the loss's mean; needed only where a loss of your own weighs examples
            unequally. The loss must then be called through ``probe.loss_fn``.
        loss_reduction: What the loss does over the batch.
        microbatch_weights: With accumulation of means: ``"equal"`` where each
            micro-batch has the same factor (``loss / k``), ``"by_size"`` where it has
            its share of the examples. They differ for unequal micro-batches only.
        batch_dim: Axis of the examples in the model's input.
        unit: What the batch's entries are, ``"example"`` or ``"sequence"``; with
            ``"token"`` they are sequences, and noise scales are counted in tokens.
        tokens: With ``unit="token"``: given a micro-batch's targets, how many tokens
            count in each sequence. Not needed for PyTorch's cross-entropy in
            ``loss_fn``, nor without ``loss_fn`` where all positions of the model's
            only input count. Where a loss of your own is a mean over tokens, give
            ``example_weights`` too.
        params: Names or patterns of the parameters to read, among those that the
            optimiser updates; all of these by default.
        scaler: The loop's gradient scaler; a step that it skips gives no reading.
        exact_bits: Whether training must keep its bits; faster ways that round
            differently may be taken otherwise.
        on_error: What becomes of an error inside the probe while training: ``"warn"``
            ends the step's reading with the reason in its coverage and one warning,
            ``"raise"`` lets it out of the training's own forward or backward pass.
        quantities: What else is computed of the same passes, such as ``"norm_test"``
            or ``"gsnr"``; ``QuantityName`` has all names. They are in
            ``Reading.quantities``, and why one is missing is in the coverage.
            ``"gsnr"``, ``"evidence_stopping"``, ``"update_size"`` and
            ``"distance_from_start"`` hold one more copy of the parameters each,
            ``"gradient_cosine"`` two, ``"hessian_noise_scale"`` ``num_chunks + 5``.
            This one and ``"cabs"`` need the loss, called through ``probe.loss_fn``.
        hessian_every: Readings from one with ``"hessian_noise_scale"`` to the next.
        budget: Share of the training time that readings may cost, such as 0.03. The
            probe times itself and picks the steps; ``Probe.overhead`` tells.
        repeatable: Whether a second run has to read the same steps, as where a
            batch-size policy follows the readings; ``budget`` is refused then.
        save_to: Run directory for the readings; made if it is not there. A name that
            ends in ``.csv`` or ``.jsonl`` is a text file instead, which other programs
            read. Of several ranks the first writes it.
        sinks: Called with every reading.
    """
    probe = probes.attach(
        model,
        optimizer,
        loss_fn=loss_fn,
        every=every,
        estimator=estimator,
        row_share=row_share,
        num_chunks=num_chunks,
        num_signs=num_signs,
        calibrate_every=calibrate_every,
        generator=generator,
        ghost_batch=ghost_batch,
        example_weights=example_weights,
        loss_reduction=loss_reduction,
        microbatch_weights=microbatch_weights,
        batch_dim=batch_dim,
        unit=unit,
        tokens=tokens,
        params=params,
        scaler=scaler,
        exact_bits=exact_bits,
        on_error=on_error,
        quantities=quantities,
        hessian_every=hessian_every,
        budget=budget,
        repeatable=repeatable,
        sinks=sinks,
    )
    if save_to is not None and probe.ranks.rank == 0:
        _record(probe, save_to)
    return probe


def _record(probe: Probe, path: Path | str) -> None:
    """Send the readings to a file or directory; take the probe off if there is none."""
    text_sink = TEXT_SINKS.get(Path(path).suffix)
    try:
        recording = RunSink(path) if text_sink is None else text_sink(path)
    except NoisekitError:
        probe.detach()
        raise
    probe.add_sink(recording)
    probe.on_detach(recording.close)
