"""What a probe cannot be attached to, with the reason and the way out."""

from collections.abc import Callable
from typing import get_args

import torch
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.probes.assembly import LossReduction, MicrobatchWeights

ESTIMATORS = ("auto", "per_example", "ghost")


def refuse_model(model: object) -> None:
    """Refuse models whose hooks would be silent or see parts of the batch.

    Raises:
        UsageError: With the reason and what to do instead.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"attach needs an nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        where = f"{type(module).__name__} at {name or 'the top'}"
        if _is_compiled(module):
            raise UsageError(
                f"attach needs a model that runs eagerly, got {where} from "
                "torch.compile, which drops module hooks silently; attach to the "
                "model before it is compiled and train that, or measure at frozen "
                "weights with gradient_noise(model, loss_fn, batches)."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"attach needs a model written in Python, got {where}; attach to the "
                "module that was scripted."
            )
        kind = _parallel_kind(module)
        if kind:
            raise UsageError(
                f"attach needs a model in one process, got {where} ({kind}): each rank "
                "sees a part of the batch, and combining ranks is not built yet; "
                "measure at frozen weights with gradient_noise on one rank."
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise UsageError(
                f"attach needs dense gradients, got {where} with sparse=True; use "
                "sparse=False, or leave it out with params=."
            )


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
    own = {id(parameter) for parameter in model.parameters()}
    groups = optimizer.param_groups
    if not any(id(p) in own for group in groups for p in group["params"]):
        raise UsageError(
            f"attach needs an optimiser of the model, got {type(optimizer).__name__} "
            f"without any parameter of {type(model).__name__}; attach after the "
            "optimiser was built from model.parameters()."
        )


def refuse_options(
    *,
    every: int | Callable[[int], bool],
    estimator: str,
    loss_reduction: str,
    microbatch_weights: str,
    unit: str,
    ghost_batch: int | None,
    loss_fn: object,
) -> None:
    """Refuse options that do not exist or do not fit together.

    Raises:
        UsageError: With what is possible instead.
    """
    if not callable(every) and every < 1:
        raise UsageError(f"every needs to be 1 or more steps, got {every}.")
    _one_of("estimator", estimator, ESTIMATORS)
    _one_of("loss_reduction", loss_reduction, get_args(LossReduction))
    _one_of("microbatch_weights", microbatch_weights, get_args(MicrobatchWeights))
    _one_of("unit", unit, ("example",))
    if estimator == "ghost" and (loss_fn is None or ghost_batch is None):
        raise UsageError(
            "estimator='ghost' replays parts of the batch, so that it needs loss_fn= "
            f"and ghost_batch=, got loss_fn={loss_fn!r}, ghost_batch={ghost_batch}."
        )
    if ghost_batch is not None and ghost_batch < 1:
        raise UsageError(f"ghost_batch needs 1 or more examples, got {ghost_batch}.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        listed = ", ".join(repr(v) for v in known)
        raise UsageError(f"{name} needs to be one of {listed}, got {value!r}.")


def _is_compiled(module: nn.Module) -> bool:
    wrapped = isinstance(getattr(module, "_orig_mod", None), nn.Module)
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def _parallel_kind(module: nn.Module) -> str:
    """Name of the data parallelism that ``module`` is part of, or nothing."""
    if isinstance(module, nn.DataParallel):
        return "DataParallel"
    kinds = {base.__name__ for base in type(module).__mro__}
    for kind in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"):
        if kind in kinds:
            return kind
    return ""
