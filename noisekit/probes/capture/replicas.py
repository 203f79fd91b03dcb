"""A model's replicas under data parallelism, as its probe has to know them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from noisekit.core.distributed import Ranks, ranks_of
from noisekit.core.errors import UsageError


class Replicas:
    """The ranks that train one model together, or a process on its own.

    Gradients are averaged over the ranks in the backward pass. Nothing is added to
    that; a reading sums its statistics over the ranks, in one all-reduce.

    Attributes:
        ranks: Who they are.
        joinable: What lets ranks without inputs take part in the probe's sums.
    """

    def __init__(self, wrapper: DistributedDataParallel | None = None) -> None:
        self.ranks: Ranks = ranks_of(wrapper)
        self.joinable: ProbeJoin | None = None
        self._wrapper = wrapper

    @property
    def wrapped(self) -> bool:
        """Whether gradients are reduced when a backward pass ends."""
        return self._wrapper is not None

    def reduces(self) -> bool:
        """Whether the backward pass of the forward now starting reduces gradients."""
        wrapper = self._wrapper
        return wrapper is None or bool(wrapper.require_backward_grad_sync)

    def mean_over_active(self) -> bool:
        """Whether ranks that ran out of inputs are left out of the average."""
        wrapper = self._wrapper
        if wrapper is None or not wrapper._join_config.enable:
            return False
        return not wrapper._divide_by_initial_world_size

    def join(self, absent_step: Callable[[], None]) -> None:
        """Have ``absent_step`` called for the steps that the others take alone."""
        if self._wrapper is not None:
            self.joinable = ProbeJoin(self._wrapper, absent_step)

    def refuse_unjoined(self) -> None:
        """Refuse a forward pass whose ranks the probe does not know of.

        Raises:
            UsageError: If the model turns out to be one of several replicas, or if
                ranks that run out of inputs stand in for the model's sums only.
        """
        wrapper = self._wrapper
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is None and active is not None:
            raise UsageError(
                "a probe needs the model that gradients are averaged for, got one that "
                "DistributedDataParallel calls; attach to the wrapped model instead."
            )
        if wrapper is None or not wrapper._join_config.enable:
            return
        if self.joinable is None or not self.joinable._join_config.enable:
            raise UsageError(
                "a probe needs to know of uneven inputs, got a model that joins "
                "without it, so that its sums would wait for ranks that ran out; "
                "write: with Join([model, probe.joinable])."
            )


class ProbeJoin(Joinable):
    """Lets ranks that ran out of inputs take part in the probe's sums, with nothing.

    Goes into ``Join`` after the model, whose hooks tell whether there was a step.
    """

    def __init__(
        self, wrapper: DistributedDataParallel, absent_step: Callable[[], None]
    ) -> None:
        super().__init__()
        self._wrapper = wrapper
        self._absent_step = absent_step

    def join_hook(self, **_: Any) -> JoinHook:  # options of the model's own hook
        """Return the hook that takes the place of this rank's steps."""
        return _AbsentSteps(self._wrapper, self._absent_step)

    @property
    def join_device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self._wrapper.join_device
        return device

    @property
    def join_process_group(self) -> "dist.ProcessGroup":
        """The model's process group."""
        group: dist.ProcessGroup = self._wrapper.join_process_group
        return group


class _AbsentSteps(JoinHook):
    def __init__(
        self, wrapper: DistributedDataParallel, absent_step: Callable[[], None]
    ) -> None:
        self._wrapper = wrapper
        self._absent_step = absent_step

    def main_hook(self) -> None:
        """Take part in a step of the others, if this was not mere accumulation."""
        if self._wrapper.require_forward_param_sync:  # set by the model's own hook
            self._absent_step()
