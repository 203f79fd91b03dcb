"""Checks of what a probe is attached to, with the reason and the way out."""

from collections.abc import Sequence

import torch
from torch import nn

from noisekit.core.distributed import Ranks
from noisekit.core.errors import UsageError
from noisekit.probes.capture.targets import Target, is_compiled_in_place, target_of
from noisekit.probes.options import ProbeOptions


def check_model(model: object) -> None:
    """Check that hooks will see the whole of the model's calls and gradients.

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
        _check_module(module, where)
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


def _check_module(module: nn.Module, where: str) -> None:
    """Check that a module runs as a whole in this process' Python."""
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
    return f"model needs to be a torch.nn.Module, got {type(model).__name__}."


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


def check_optimizer(optimizer: object, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer whose step hooks are called, inside any wrapper.

    Raises:
        UsageError: If there is none, or it updates no parameter of the model.
    """
    inner = optimizer
    while not _has_step_hooks(inner) and hasattr(inner, "optimizer"):
        inner = inner.optimizer  # such as Accelerate's AcceleratedOptimizer
    if isinstance(optimizer, list | tuple):
        raise UsageError(
            f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__} of "
            f"{len(optimizer)}: readings are of one optimizer's steps; attach once for "
            "each, and each probe reads the parameters of its own."
        )
    if not isinstance(inner, torch.optim.Optimizer):
        raise UsageError(
            "attach needs a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; give the optimizer inside the wrapper."
        )
    if not _has_step_hooks(inner):
        raise UsageError(
            f"attach needs an optimizer that calls its step hooks, got a "
            f"{type(optimizer).__name__} that wraps another; give the optimizer inside "
            "the wrapper."
        )
    own = {id(parameter) for parameter in model.parameters()}
    groups = inner.param_groups
    if not any(id(p) in own for group in groups for p in group["params"]):
        raise UsageError(
            f"attach needs an optimizer of the model, got {type(optimizer).__name__} "
            f"without any parameter of {type(model).__name__}; attach after the "
            "optimizer was built from model.parameters()."
        )
    return inner


def _has_step_hooks(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and hasattr(
        optimizer, "_optimizer_step_post_hooks"
    )


def check_ranks(
    options: ProbeOptions, estimators: Sequence[str], target: Target, ranks: Ranks
) -> None:
    """Check that what is asked for adds up over several ranks.

    Raises:
        UsageError: With the reason and what to do instead.
    """
    if ranks.alone:
        return
    if options.budget is not None:
        raise UsageError(
            "budget needs steps that the clock may choose, got a run where the clocks "
            f"of {ranks.size} ranks differ, and all must read one step; use every=."
        )
    for path, module in target.model.named_modules():
        for name in estimators if isinstance(module, nn.SyncBatchNorm) else ():
            if name in ("accumulation", "ranks", "ghost"):
                raise UsageError(
                    f"estimator={name!r} needs ranks whose gradients are independent, "
                    f"got SyncBatchNorm at {path}, which couples the examples of "
                    f"{ranks.size} ranks; use estimator='per_example' with BatchNorm "
                    "in evaluation mode, or BatchNorm that is not synchronised."
                )
