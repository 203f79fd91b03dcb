"""Updates of several micro-batches, as many as a policy decides."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.errors import UsageError
from noisekit.policies.point import At
from noisekit.policies.policy import Decision, Policy
from noisekit.policies.policy_sampler import PolicySampler, sharing_ranks
from noisekit.policies.readings import ReadingSource
from noisekit.policies.stream import Cut

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = TypeVar("Batch")


class GradientAccumulation(PolicySampler):
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
        self._chunk = microbatch * ranks.size
        super().__init__(
            count,
            policy,
            ranks=ranks,
            multiple=self._chunk,
            seed=seed,
            shuffle=shuffle,
            epoch_end="run_on",
            length=length,
            optimizer=optimizer,
        )
        self._used = 0  # after the last micro-batch that was used
        self._current: Update[Any] | None = None

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
        return {**self._state(self._done), "chunk": self._chunk}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the last complete update of a saved state.

        Raises:
            CheckpointError: If it is of another policy, seed or number of examples.
        """
        self._load_state(state_dict)
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
