"""What a probe is attached to, once wrappers around the model are taken off."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from noisekit.core.layers.per_example import enclosing_path


@dataclass(frozen=True, slots=True)
class Target:
    """A model and its wrappers.

    Attributes:
        model: The model itself, whose parameters are read.
        caller: The module whose hooks see every call of it: a compiled wrapper's do,
            while those of what it has compiled are left out.
        wrapper: What averages gradients over ranks, if anything does.
        opaque: By path of a compiled part, whose layers cannot be hooked: the path of
            the smallest module with hooks around it, which is replayed for it.
    """

    model: nn.Module
    caller: nn.Module
    wrapper: DistributedDataParallel | None
    opaque: Mapping[str, str]

    def replayed(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
        """Return, by parameter, the module to replay where layers are compiled."""
        paths: dict[int, str] = {}
        for part, path in self.opaque.items():
            for parameter in self.model.get_submodule(part).parameters():
                paths.setdefault(id(parameter), path)
        return {
            name: paths[id(parameter)]
            for name, parameter in parameters.items()
            if id(parameter) in paths
        }


def target_of(model: nn.Module) -> Target:
    """Return the model inside ``model``, its wrappers, and its compiled parts."""
    caller: nn.Module | None = None
    wrapper: DistributedDataParallel | None = None
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            caller, model = model if caller is None else caller, compiled
        elif isinstance(model, DistributedDataParallel):
            wrapper, model = model, model.module
        else:
            break
    opaque = {"": ""} if caller is not None else _compiled_parts(model)
    return Target(model, model if caller is None else caller, wrapper, opaque)


def eagerly(compiled: bool) -> AbstractContextManager[object]:
    """Run what ``torch.compile`` has wrapped as it was written, if there is any."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, which leaves its own hooks out."""
    return getattr(module, "_compiled_call_impl", None) is not None


def _compiled_parts(model: nn.Module) -> dict[str, str]:
    """See ``Target.opaque``; parts come before parts of their own."""
    paths: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            paths[path] = path
        elif is_compiled_in_place(module):
            paths[path] = enclosing_path(model, [path])
    return paths
