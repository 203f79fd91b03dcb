"""What a module's call depends on and may change, beside its inputs and parameters."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisekit.core.model_copies import copy_module


@dataclass(frozen=True, slots=True)
class CallState:
    """What a call of a module may depend on, as it was before the call.

    Attributes:
        module: A copy of the module with all that it holds.
        random: State of the generator that the call draws from.
    """

    module: nn.Module
    random: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> "CallState":
        """Return the state of ``module`` now.

        Raises:
            ModelCopyError: If the module cannot be copied.
        """
        return cls(copy_module(module), random_state(module))

    def has_drawn(self, module: nn.Module) -> bool:
        """Whether random numbers have been drawn since."""
        return not torch.equal(self.random, random_state(module))


def autocast_dtype(module: nn.Module) -> torch.dtype | None:
    """Return what operations on the device of ``module`` are cast to, if they are."""
    kind = _device_of(module.parameters()).type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_as(
    dtype: torch.dtype | None, tensors: Iterable[Tensor]
) -> AbstractContextManager[object]:
    """Cast operations to ``dtype`` again, weights anew: they may be other ones."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(_device_of(tensors).type, dtype=dtype, cache_enabled=False)


def random_state(module: nn.Module) -> Tensor:
    """Return the state of the generator that a call of ``module`` draws from."""
    device = _device_of(module.parameters())
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def restore_random_state(state: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set the generator of the device that ``tensors`` are on."""
    device = _device_of(tensors)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _device_of(tensors: Iterable[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
