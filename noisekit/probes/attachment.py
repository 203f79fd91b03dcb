"""Attaching a probe to a model and its optimizer, after all checks."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from noisekit.core.errors import NoParametersError, ProbeAdvice
from noisekit.core.params import layout_of, select_parameters
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.replicas import Replicas
from noisekit.probes.capture.targets import target_of
from noisekit.probes.optimizer_steps import is_attached
from noisekit.probes.options import ProbeOptions
from noisekit.probes.probe import Probe
from noisekit.probes.validation import check_model, check_optimizer, check_ranks


def attach_probe(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: ProbeOptions
) -> Probe:
    """Hook a model and its optimizer; the readings go nowhere but to ``sinks``.

    Args:
        model: Trained by calling it; its first tensor input holds the batch.
        optimizer: Whose steps are read.
        options: How.

    Raises:
        UsageError: If hooks would be silent on the model or see a part of it only, as
            where it is sharded or scripted, or if an option does not fit.
        NoParametersError: If there is nothing to read.
        DeviceMismatchError: If the parameters are on several devices.
    """
    check_model(model)
    target = target_of(model)
    optimizer = check_optimizer(optimizer, target.model)
    if is_attached(optimizer):
        warnings.warn(
            "another probe reads the steps of this optimizer already, at its own cost; "
            "detach it if this is a notebook cell run again, or write `with "
            "nk.attach(...) as probe:`.",
            ProbeAdvice,
            stacklevel=3,
        )
    _advise_of_others(optimizer, target.model)
    replicas = Replicas(target.wrapper)
    estimators, metrics = options.estimators(), options.metrics()
    check_ranks(options, [e.name for e in estimators], target, replicas.ranks)
    chosen = select_parameters(target.model, options.params)
    named = _updated(chosen, optimizer)
    layout_of(named)  # refuses parameters on several devices
    recorder = Recorder(
        target.model,
        named,
        batch_dim=options.batch_dim,
        replicas=replicas,
        caller=target.caller,
        opaque=target.replayed(named),
        exact_bits=options.exact_bits,
        on_error=options.on_error,
    )
    try:
        return Probe(recorder, optimizer, options, estimators, metrics)
    except Exception:
        recorder.remove()
        raise


def _advise_of_others(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Warn that readings leave out what the optimizer updates outside the model."""
    own = {id(parameter) for parameter in model.parameters()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    outside = [parameter for parameter in stepped if id(parameter) not in own]
    if outside:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in outside[:3])
        warnings.warn(
            f"the optimizer updates {len(outside)} tensors that are no parameters of "
            f"{type(model).__name__} ({shapes}), such as a loss's own; readings leave "
            "them out. To have them read, make the loss a part of the model.",
            ProbeAdvice,
            stacklevel=4,
        )


def _updated(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """Return the parameters among ``named`` that the optimizer updates."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    updated = {name: p for name, p in named.items() if id(p) in own}
    if not updated:
        raise NoParametersError(
            "attach needs parameters that the optimizer updates, got only others "
            f"({', '.join(list(named)[:5])}); attach with the optimizer of these."
        )
    return updated
