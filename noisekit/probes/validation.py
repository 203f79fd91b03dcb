"""What a probe cannot be attached to, with the reason and the way out."""

from typing import get_args

import torch
from torch import nn

from noisekit.core.distributed import Ranks
from noisekit.core.errors import UsageError
from noisekit.probes.capture.hooks import OnError
from noisekit.probes.capture.targets import Target, is_compiled_in_place, target_of
from noisekit.probes.capture.tokens import refusal_of_tokens
from noisekit.probes.estimators.assembly import LossReduction, MicrobatchWeights
from noisekit.probes.estimators.choice import EstimatorOptions, refuse_unit
from noisekit.probes.options import ProbeOptions


def refuse_model(model: object) -> None:
    """Refuse models whose hooks would be silent or see a part of the model only.

    Raises:
        UsageError: With the reason and what to do instead.
    """
    if not isinstance(model, nn.Module):
        kind = _pipeline_kind(type(model))
        raise UsageError(_pipeline(kind) if kind else _no_module(model))
    inner = target_of(model).model
    for name, module in inner.named_modules():
        where = f"{type(module).__name__} at {name or 'the top'}"
        if is_compiled_in_place(module) and not name:
            raise UsageError(
                f"attach needs a model whose calls can be hooked, got {where} compiled "
                "in place, which drops its hooks silently; train what "
                "torch.compile(model) returns, and attach to that."
            )
        _refuse_foreign(module, where)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise UsageError(
                f"attach needs dense gradients, got {where} with sparse=True; use "
                "sparse=False, or leave it out with params=."
            )
    for name, parameter in inner.named_parameters():
        if "DTensor" in _kinds(type(parameter)):
            raise UsageError(
                f"attach needs whole parameters on every rank, got {name} sharded as a "
                "DTensor (FSDP2 or tensor parallelism): its hooks see a shard of the "
                "gradient, or none; measure at frozen weights with gradient_noise on "
                "an unsharded copy, or train with DistributedDataParallel."
            )


def _refuse_foreign(module: nn.Module, where: str) -> None:
    """Refuse modules that do not run, or not as a whole, in this process' Python."""
    kinds = _kinds(type(module))
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(
            f"attach needs a model written in Python, got {where}; attach to the "
            "module that was scripted."
        )
    if isinstance(module, nn.DataParallel):
        raise UsageError(
            f"attach needs a model that is called as a whole, got {where}: its "
            "replicas live for one call and see parts of the batch; use "
            "DistributedDataParallel, whose ranks are read together."
        )
    if "DistributedDataParallel" in kinds:
        raise UsageError(
            f"attach needs DistributedDataParallel around the whole model, got {where} "
            "inside it; wrap the model as a whole."
        )
    if kinds & _SHARDED:
        raise UsageError(
            f"attach needs whole parameters on every rank, got {where}, which shards "
            "them: hooks see a shard of the gradient, or none; measure at frozen "
            "weights with gradient_noise on an unsharded copy, or train with "
            "DistributedDataParallel."
        )
    kind = _pipeline_kind(type(module))
    if kind:
        raise UsageError(_pipeline(kind))


def _no_module(model: object) -> str:
    return f"attach needs an nn.Module, got {type(model).__name__}."


def _pipeline(kind: str) -> str:
    return (
        f"attach needs the whole model on every rank, got {kind} (pipeline "
        "parallelism): this rank has some layers only and no loss; measure at frozen "
        "weights with gradient_noise on the whole model."
    )


_SHARDED = frozenset({"FSDPModule", "FullyShardedDataParallel", "DeepSpeedEngine"})
_PIPELINED = frozenset({"Pipe", "_PipelineStageBase", "_PipelineSchedule"})


def _kinds(cls: type) -> set[str]:
    return {base.__name__ for base in cls.__mro__}


def _pipeline_kind(cls: type) -> str:
    return cls.__name__ if _kinds(cls) & _PIPELINED else ""


def refuse_optimizer(optimizer: object, model: nn.Module) -> None:
    """Refuse what is no optimiser of the model.

    Raises:
        UsageError: If it is none, or updates no parameter of the model.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            "attach needs a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; give the optimiser inside the wrapper."
        )
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise UsageError(
            f"attach needs an optimiser that calls its step hooks, got a "
            f"{type(optimizer).__name__} that wraps another; give the optimiser inside "
            "the wrapper."
        )
    own = {id(parameter) for parameter in model.parameters()}
    groups = optimizer.param_groups
    if not any(id(p) in own for group in groups for p in group["params"]):
        raise UsageError(
            f"attach needs an optimiser of the model, got {type(optimizer).__name__} "
            f"without any parameter of {type(model).__name__}; attach after the "
            "optimiser was built from model.parameters()."
        )


def refuse_options(options: ProbeOptions) -> None:
    """Refuse options that do not exist or do not fit together.

    Raises:
        UsageError: With what is possible instead.
    """
    every, ghost_batch = options.every, options.ghost_batch
    if not callable(every) and every < 1:
        raise UsageError(f"every needs to be 1 or more steps, got {every}.")
    _one_of("loss_reduction", options.loss_reduction, get_args(LossReduction))
    _one_of(
        "microbatch_weights", options.microbatch_weights, get_args(MicrobatchWeights)
    )
    _one_of("on_error", options.on_error, get_args(OnError))
    refuse_unit(options.unit)
    uncounted = refusal_of_tokens(options.unit, options.tokens, options.loss_fn)
    if uncounted is not None:
        raise UsageError(uncounted)
    names = EstimatorOptions.of(
        options.estimator,
        row_share=options.row_share,
        num_chunks=options.num_chunks,
        num_signs=options.num_signs,
        calibrate_every=options.calibrate_every,
    ).names
    if options.example_weights is not None and options.loss_fn is None:
        raise UsageError(
            "example_weights= needs the loss to be seen, got loss_fn=None; give it to "
            "attach() and call it through probe.loss_fn."
        )
    if "ghost" in names and (options.loss_fn is None or ghost_batch is None):
        raise UsageError(
            "estimator='ghost' replays parts of the batch, so that it needs loss_fn= "
            f"and ghost_batch=, got loss_fn={options.loss_fn!r}, "
            f"ghost_batch={ghost_batch}."
        )
    if ghost_batch is not None and ghost_batch < 1:
        raise UsageError(f"ghost_batch needs 1 or more examples, got {ghost_batch}.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        listed = ", ".join(repr(v) for v in known)
        raise UsageError(f"{name} needs to be one of {listed}, got {value!r}.")


def refuse_ranks(options: ProbeOptions, target: Target, ranks: Ranks) -> None:
    """Refuse what does not add up over several ranks.

    Raises:
        UsageError: With the reason and what to do instead.
    """
    if ranks.alone:
        return
    asked = options.estimator
    names = (asked,) if isinstance(asked, str) else asked
    if options.calibrate_every is not None:
        raise UsageError(
            f"calibrate_every needs one process, got {ranks.size} ranks: the ratio is "
            "not a sum over ranks; leave it out, or use estimator='rows'."
        )
    for path, module in target.model.named_modules():
        for name in names if isinstance(module, nn.SyncBatchNorm) else ():
            if name in ("accumulation", "ranks", "ghost"):
                raise UsageError(
                    f"estimator={name!r} needs ranks whose gradients are independent, "
                    f"got SyncBatchNorm at {path}, which couples the examples of "
                    f"{ranks.size} ranks; use estimator='per_example' with BatchNorm "
                    "in evaluation mode, or BatchNorm that is not synchronised."
                )


def refuse_budget(options: ProbeOptions, ranks: Ranks) -> None:
    """Refuse a budget where the clock must not decide which steps are read.

    Raises:
        UsageError: With the reason.
    """
    budget = options.budget
    if budget is None:
        return
    if not 0.0 < budget < 1.0:
        raise UsageError(f"budget needs a share of the time in (0, 1), got {budget}.")
    if options.every != 1:
        raise UsageError(
            f"budget={budget} and every={options.every} both say which steps are read; "
            "give one of them."
        )
    reason = ""
    if options.repeatable:
        reason = "repeatable=True promises the same steps on a second run"
    elif torch.are_deterministic_algorithms_enabled():
        reason = "deterministic algorithms promise that a second run is the same"
    elif not ranks.alone:
        reason = f"the clocks of {ranks.size} ranks differ, and all must read one step"
    if reason:
        raise UsageError(
            f"budget needs steps that the clock may choose, got a run where {reason}; "
            "use every=."
        )
