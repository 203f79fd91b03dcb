"""What the samplers share that take their batch sizes from a policy."""

from collections.abc import Mapping, Sized
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from noisekit.core.distributed import Ranks, ranks_of
from noisekit.core.errors import CheckpointError
from noisekit.policies.driver import PolicyDriver
from noisekit.policies.point import At
from noisekit.policies.policy import Policy
from noisekit.policies.stream import EpochEnd, ExampleStream, Place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PolicySampler(Sampler[list[int]]):
    """A stream of examples, the policy that cuts it, and where it has come to."""

    def __init__(
        self,
        data: Sized | int,
        policy: Policy,
        *,
        ranks: Ranks,
        multiple: int,
        seed: int,
        shuffle: bool,
        epoch_end: EpochEnd,
        length: At | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Start before the first update, with sizes that are multiples of a number."""
        count = data if isinstance(data, int) else len(data)
        self._seed = seed
        self._stream = ExampleStream(
            count, seed=seed, shuffle=shuffle, epoch_end=epoch_end, ranks=ranks
        )
        self._driver = PolicyDriver(
            policy,
            num_examples=count,
            multiple=multiple,
            ranks=ranks,
            length=length,
            optimizer=optimizer,
        )
        self._done = Place()  # after the last complete update

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self._driver.policy

    @property
    def num_updates(self) -> int:
        """Complete updates so far."""
        return self._done.updates

    @property
    def epoch(self) -> int:
        """The pass that the next update begins in, from 0."""
        return self._done.cursor // self._stream.num_examples

    def _state(self, done: Place) -> dict[str, Any]:
        """Return the state after an update, as JSON."""
        return {
            "seed": self._seed,
            "num_examples": self._stream.num_examples,
            "done": asdict(done),
            "driver": self._driver.state_dict(),
        }

    def _load_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: If it is of another policy, seed or number of examples.
        """
        own = {"seed": self._seed, "num_examples": self._stream.num_examples}
        for name, value in own.items():
            if saved[name] != value:
                raise CheckpointError(
                    f"the state of a sampler with {name}={value} is needed, got one "
                    f"with {name}={saved[name]}; build the sampler as it was saved."
                )
        self._driver.load_state_dict(saved["driver"])
        self._done = Place(**saved["done"])


def sharing_ranks(process_group: "ProcessGroup | None") -> Ranks:
    """Return the processes of a group, by default all that there are."""
    if process_group is None and dist.is_available() and dist.is_initialized():
        process_group = dist.group.WORLD
    return ranks_of(process_group)
