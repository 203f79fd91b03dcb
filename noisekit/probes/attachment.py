"""One line in somebody's training loop: checks what is asked, and attaches."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from noisekit.core.errors import NoParametersError
from noisekit.core.params import ParameterPatterns, layout_of, select_parameters
from noisekit.core.risk import LossFn
from noisekit.core.vocabulary import QuantityName
from noisekit.probes.capture.example_weights import ExampleWeights
from noisekit.probes.capture.hooks import OnError
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.replicas import Replicas
from noisekit.probes.capture.targets import target_of
from noisekit.probes.capture.tokens import TokenCounts
from noisekit.probes.estimators.assembly import LossReduction, MicrobatchWeights
from noisekit.probes.estimators.choice import Estimator, Unit
from noisekit.probes.options import ProbeOptions, Sink
from noisekit.probes.probe import Probe
from noisekit.probes.step_metrics.options import refuse_quantities
from noisekit.probes.validation import (
    refuse_budget,
    refuse_model,
    refuse_optimizer,
    refuse_options,
    refuse_ranks,
)


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
    sinks: Iterable[Sink] = (),
) -> Probe:
    """Read gradient and gradient noise at every optimiser step of a training loop.

    Attaching changes no bit of the training. Norms are read in the loop's own
    backward pass, before clipping, and a reading appears when the optimiser steps.

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
        sinks: Called with every reading.

    Raises:
        UsageError: If hooks would be silent on the model or see a part of it only, as
            where it is sharded or scripted, or if an option does not fit.
        NoParametersError: If there is nothing to read.
        DeviceMismatchError: If the parameters are on several devices.
    """
    options = ProbeOptions(
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
        quantities=(quantities,) if isinstance(quantities, str) else tuple(quantities),
        hessian_every=hessian_every,
        budget=budget,
        repeatable=repeatable,
        sinks=tuple(sinks),
    )
    refuse_model(model)
    target = target_of(model)
    refuse_optimizer(optimizer, target.model)
    refuse_options(options)
    replicas = Replicas(target.wrapper)
    refuse_budget(options, replicas.ranks)
    refuse_ranks(options, target, replicas.ranks)
    refuse_quantities(options, optimizer, replicas.ranks)
    named = _updated(select_parameters(target.model, params), optimizer)
    layout_of(named)  # refuses parameters on several devices
    recorder = Recorder(
        target.model,
        named,
        batch_dim=batch_dim,
        replicas=replicas,
        caller=target.caller,
        opaque=target.replayed(named),
        exact_bits=exact_bits,
        on_error=on_error,
    )
    return Probe(recorder, optimizer, options)


def _updated(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """Return the parameters among ``named`` that the optimiser updates."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {name: p for name, p in named.items() if id(p) in own}
    if not found:
        raise NoParametersError(
            "attach needs parameters that the optimiser updates, got only others "
            f"({', '.join(list(named)[:5])}); attach with the optimiser of these."
        )
    return found
