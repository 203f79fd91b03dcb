"""Updates of several micro-batches, as many as a policy decides."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from noisekit.core.arguments import checked
from noisekit.core.errors import CheckpointError, UsageError
from noisekit.policies.driver import PolicyDriver
from noisekit.policies.point import At
from noisekit.policies.policy import Decision, Policy
from noisekit.policies.readings import ReadingSource
from noisekit.policies.sampler import sharing_ranks
from noisekit.policies.stream import Cut, ExampleStream, Place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = TypeVar("Batch")


class GradientAccumulation(Sampler[list[int]]):
    r"""Micro-batches of one size, of which a policy decides how many make an update.

    For batches that do not fit into memory, for BatchNorm, which sees the same number
    of examples whatever the batch, and for loaders with workers: the loader prefetches
    micro-batches, and an update's size is decided when it begins, so that nothing lags.
    Sizes are rounded up to multiples of a micro-batch on every process. At the end of a
    pass an update goes on in the next one.

    It is a ``batch_sampler``; :meth:`updates` gives the loader's micro-batches update
    by update. ``state_dict()`` is that after the last complete update, as JSON.

    Args:
        data: The data set, or how many examples it has.
        policy: Decides the global batch size of every update.
        microbatch: Examples of a micro-batch, on each process.
        seed: Of the order.
        shuffle: Whether every pass has a new random order.
        length: Length of the run, for policies with points at a share of it.
        optimizer: Has the learning rate, for policies that need it.
        process_group: The processes that share a batch; all of them by default, where
            ``torch.distributed`` is initialized.

    Raises:
        UsageError: If an argument is out of bounds, or the policy refuses the
            optimizer.

    Example:
        >>> import torch
        >>> import noisekit as nk
        >>> growth = nk.Growth(2, factor=2, every=nk.At(updates=1), max=8)
        >>> sampler = nk.GradientAccumulation(8, growth, microbatch=2, shuffle=False)
        >>> loader = torch.utils.data.DataLoader(range(8), batch_sampler=sampler)
        >>> for update in sampler.updates(loader):
        ...     print([microbatch.tolist() for microbatch in update])
        [[0, 1]]
        [[2, 3], [4, 5]]
        [[6, 7], [0, 1], [2, 3], [4, 5]]
    """

    @checked
    @checked
    def __init__(
        self,
        data: Sized | int,
        policy: Policy,
        *,
        microbatch: int,
        seed: int = 0,
        shuffle: bool = True,
        length: At | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        """Start before the first update."""
        ranks = sharing_ranks(process_group)
        count = data if isinstance(data, int) else len(data)
        if not 1 <= microbatch <= count // ranks.size:
            raise UsageError(
                "microbatch needs to be at least 1 and at most the examples per "
                f"process, {count // ranks.size}, got {microbatch}."
            )
        self._seed = seed
        self._stream = ExampleStream(
            count, seed=seed, shuffle=shuffle, epoch_end="run_on", ranks=ranks
        )
        self._chunk = microbatch * ranks.size
        self._driver = PolicyDriver(
            policy,
            num_examples=count,
            multiple=self._chunk,
            ranks=ranks,
            length=length,
            optimizer=optimizer,
        )
        self._done = Place()  # after the last complete update
        self._used = 0  # after the last micro-batch that was used
        self._current: Update[Any] | None = None

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

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the micro-batches of the pass from the last used one on."""
        cursor = self._used
        end = self._stream.pass_end(cursor)
        while cursor < end:
            cut = Cut(cursor, self._chunk, cursor + self._chunk)
            yield self._stream.indices(cut)
            cursor = cut.end

    def updates(self, loader: Iterable[Batch]) -> Iterator["Update[Batch]"]:
        """Yield the updates that begin in the present pass.

        Args:
            loader: Whose ``batch_sampler`` this is.

        Yields:
            Updates, each to be iterated over once, to its end.

        Raises:
            UsageError: If an update's micro-batches were not all used.
        """
        self._current, self._used = None, self._done.cursor
        batches = self._microbatches(loader)
        end = self._stream.pass_end(self._used)
        while self._used < end:
            decision = self._driver.decide(self._done, waits=False)
            count = decision.batch_size // self._chunk
            self._current = update = Update(decision, count, batches)
            yield update
            if self._current is update:  # not observed
                self.observe()

    def _microbatches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's micro-batches, pass after pass.

        Yields:
            Micro-batches.
        """
        while True:
            before = self._used
            for batch in loader:
                self._used += self._chunk
                yield batch
            if self._used == before:
                raise UsageError(
                    "updates() needs the loader whose batch_sampler this is, got one "
                    "without batches."
                )

    def observe(
        self, probe: ReadingSource | None = None, /, **values: float | Tensor | None
    ) -> None:
        """Say what was seen of the present update.

        An update that is not observed counts as taken when the next one is asked for.

        Args:
            probe: A probe whose last step was this update.
            **values: Numbers by the names of :class:`Observation`, or by others that
                the policy needs; of this process's share, such as its mean loss.

        Raises:
            UsageError: If there is no update, or micro-batches of it are left.
        """
        update = self._current
        if update is None:
            raise UsageError(
                "observe() needs an update that was not yet observed, got none; call "
                "it once in every pass of the loop over updates()."
            )
        if update.num_left:
            raise UsageError(
                f"an update needs all its {update.num_microbatches} micro-batches, "
                f"got {update.num_microbatches - update.num_left}; iterate over the "
                "update to its end."
            )
        size = update.decision.batch_size
        self._driver.observe(probe, values, batch_size=size)
        self._current = None
        begin = self._done.cursor
        self._done = Cut(begin, size, begin + size).after(self._done)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last complete update, as JSON."""
        return {
            "seed": self._seed,
            "num_examples": self._stream.num_examples,
            "chunk": self._chunk,
            "done": asdict(self._done),
            "driver": self._driver.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the last complete update of a saved state.

        Raises:
            CheckpointError: If it is of another policy, seed or number of examples.
        """
        own = {"seed": self._seed, "num_examples": self._stream.num_examples}
        for name, value in own.items():
            if state_dict[name] != value:
                raise CheckpointError(
                    f"the state of a sampler with {name}={value} is needed, got one "
                    f"with {name}={state_dict[name]}; build it as it was saved."
                )
        self._driver.load_state_dict(state_dict["driver"])
        self._done = Place(**state_dict["done"])
        self._used, self._current = self._done.cursor, None


class Update(Iterable[Batch]):
    """The micro-batches of one update, to be iterated over once.

    Attributes:
        decision: What the policy decided; its batch size is over all micro-batches and
            processes.
        num_microbatches: Micro-batches on this process.
        share: Part of the update's mean that one micro-batch is: multiply each one's
            mean loss with it.
        num_left: Micro-batches not yet used.
    """

    def __init__(
        self, decision: Decision, num_microbatches: int, batches: Iterator[Batch]
    ) -> None:
        self.decision = decision
        self.num_microbatches = self.num_left = num_microbatches
        self.share = 1 / num_microbatches
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield those that are left."""
        while self.num_left:
            batch = next(self._batches)
            self.num_left -= 1
            yield batch
