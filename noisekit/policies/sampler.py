"""A batch sampler whose batch sizes a policy decides, for a plain ``DataLoader``."""

import warnings
from collections import deque
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.errors import CheckpointError, PolicyWarning, UsageError
from noisekit.policies.point import At
from noisekit.policies.policy import Decision, Policy
from noisekit.policies.policy_sampler import PolicySampler, sharing_ranks
from noisekit.policies.readings import ReadingSource
from noisekit.policies.stream import Cut, EpochEnd, Place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_FORGOTTEN = 1024
"""Batches without ``observe`` after which a policy that needs readings warns."""


@dataclass(frozen=True, slots=True)
class Handed:
    """A batch that was handed out.

    Attributes:
        decision: The decision about it.
        cut: Its examples.
    """

    decision: Decision
    cut: Cut


class AdaptiveBatchSampler(PolicySampler):
    r"""Batches of the sizes that a policy asks for, as a loader's ``batch_sampler``.

    Call :meth:`observe` once after every update, with a probe or with your own numbers.
    One iteration is one pass over the data. The order of the examples is a function of
    the seed alone; the policy decides where it is cut.

    **Lag.** A loader with workers asks for batches ahead, so that a size answers to the
    reading of ``num_workers * prefetch_factor`` updates earlier than without workers;
    with ``num_workers=0`` nothing lags. Policies that are functions of the position
    never lag, and neither does :class:`GradientAccumulation`.

    **Resume.** ``state_dict()`` is that after the last observed update, as JSON:
    batches that a loader was handed but that were not observed come again, in the same
    sizes.

    **Processes.** Each process gets a share of the global batch, all of one size: sizes
    are rounded up to a multiple of the number of processes. Numbers given to
    ``observe`` are averaged over them, so that all decide alike; a probe's readings are
    those of all processes already.

    A batch is never larger than the data set. There is no ``len()``: how many batches a
    pass has is not known beforehand.

    Args:
        data: The data set, or how many examples it has.
        policy: Decides the global batch size of every update.
        seed: Of the order.
        shuffle: Whether every pass has a new random order.
        epoch_end: A batch that reaches over the end of a pass goes on in the next one
            (``"run_on"``, where all sizes are those asked for and no example is left
            out), is made smaller (``"ragged"``), or is left out (``"drop"``).
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
        >>> sampler = nk.AdaptiveBatchSampler(8, growth, shuffle=False)
        >>> for batch in torch.utils.data.DataLoader(range(8), batch_sampler=sampler):
        ...     print(batch.tolist())
        ...     sampler.observe()
        [0, 1]
        [2, 3, 4, 5]
        [6, 7, 0, 1, 2, 3, 4, 5]
    """

    @checked
    def __init__(
        self,
        data: Sized | int,
        policy: Policy,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epoch_end: EpochEnd = "run_on",
        length: At | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        """Start before the first update."""
        ranks = sharing_ranks(process_group)
        super().__init__(
            data,
            policy,
            ranks=ranks,
            multiple=ranks.size,
            seed=seed,
            shuffle=shuffle,
            epoch_end=epoch_end,
            length=length,
            optimizer=optimizer,
        )
        self._next = self._done  # after the last batch that was handed out
        self._outstanding: deque[Handed] = deque()  # handed out, not observed
        self._again: deque[Handed] = deque()  # of these, to be handed out again
        self._observes = False
        self._unknown = self._has_warned = False
        self._looked_at: int | None = None  # batches handed out then

    @property
    def decision(self) -> Decision:
        """The decision about the batch at hand, until it is observed.

        Raises:
            UsageError: If it is not known which batch that is, since ``observe`` is not
                called.
        """
        if not self._observes:
            handed = self._next.updates
            if self._looked_at not in (None, handed):
                raise UsageError(
                    f"{handed} batches were handed out and none observed, so that the "
                    "one at hand is not known; call observe() after every update, and "
                    "read decision before that."
                )
            self._looked_at = handed
        if self._outstanding:
            return self._outstanding[0].decision
        return self._driver.state.decision

    def __iter__(self) -> "BatchIterator":
        """Return the batches of the pass from the last observed update on."""
        unused = [*self._outstanding, *self._again]
        if unused and self._observes:
            self._again = deque(unused)
            self._next = self._done
        else:  # nobody says what was used: what was handed out
            self._done = self._next
        self._outstanding.clear()
        first = self._again[0].cut.begin if self._again else self._next.cursor
        return BatchIterator(self, self._stream.pass_end(first))

    def next_batch(self, end: int) -> list[int] | None:
        """Return the next batch if it begins before ``end``; for the iterator."""
        if self._unknown:
            raise CheckpointError(
                "the state of a sampler needs to say which batches were used, got one "
                "saved without any observe(); call observe() after every update."
            )
        handed = self._again[0] if self._again else self._decided(end)
        if handed is None or handed.cut.begin >= end:
            return None
        if self._again:
            self._again.popleft()
        self._outstanding.append(handed)
        self._next = handed.cut.after(self._next)
        self._note_forgotten()
        return self._stream.indices(handed.cut)

    def _decided(self, end: int) -> "Handed | None":
        """Decide about a new batch; nothing where the pass has come to its end."""
        if self._next.cursor >= end:
            return None
        before = self._driver.state
        decision = self._driver.decide(self._next, waits=bool(self._outstanding))
        cut = self._stream.cut(self._next.cursor, decision.batch_size)
        if cut is not None:
            return Handed(decision, cut)
        # The rest of the pass is left out: decide anew where the next one begins.
        self._driver.state = before
        self._next = replace(self._next, cursor=end)
        if not self._outstanding:
            self._done = self._next
        return None

    def _note_forgotten(self) -> None:
        if len(self._outstanding) < _FORGOTTEN or self._has_warned:
            return
        self._has_warned = True
        if self.policy.needs:
            warnings.warn(
                f"{_FORGOTTEN} batches were handed out and not observed: "
                f"{type(self.policy).__name__} cannot change the batch size; call "
                "observe() after every update.",
                PolicyWarning,
                stacklevel=3,
            )

    def observe(
        self, probe: ReadingSource | None = None, /, **values: float | Tensor | None
    ) -> None:
        """Say that an update was taken, and what was seen of it.

        Args:
            probe: A probe whose last step was this update.
            **values: Numbers by the names of :class:`Observation`, or by others that
                the policy needs; of this process's share, such as its mean loss.

        Raises:
            UsageError: If no batch is outstanding, or a name is unknown.
        """
        if not self._outstanding:
            raise UsageError(
                "observe() needs a batch that was handed out and not yet observed, got "
                "none; call it once after every update."
            )
        cut = self._outstanding[0].cut
        self._driver.observe(probe, values, batch_size=cut.count)
        self._observes = True
        self._outstanding.popleft()
        self._done = cut.after(self._done)
        if not self._outstanding and not self._again:
            self._done = self._next  # beyond what a pass's end leaves out

    # ----------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last observed update, as JSON."""
        return self._saved(self._done, [*self._outstanding, *self._again])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the last observed update of a saved state.

        Raises:
            CheckpointError: If it is of another policy, seed or number of examples.
        """
        self._load_state(state_dict)
        self._next = self._done
        self._outstanding.clear()
        self._again = deque(
            Handed(Decision(**saved["decision"]), Cut(**saved["cut"]))
            for saved in state_dict["outstanding"]
        )
        self._observes = state_dict["observes"]
        self._unknown = bool(self._again) and not self._observes

    def _saved(self, done: Place, outstanding: list["Handed"]) -> dict[str, Any]:
        return {
            **self._state(done),
            "outstanding": [asdict(handed) for handed in outstanding],
            "observes": self._observes,
        }

    def handed_out(self) -> dict[str, Any]:
        """Return the state after the last batch handed out; for the iterator."""
        return self._saved(self._next, [])


class BatchIterator:
    """The batches of one pass.

    Its ``state_dict`` counts what was handed out, as loaders expect that keep the state
    of their sampler's iterator themselves.
    """

    def __init__(self, sampler: AdaptiveBatchSampler, end: int) -> None:
        self._sampler = sampler
        self._end = end

    def __iter__(self) -> "BatchIterator":
        """Return itself."""
        return self

    def __next__(self) -> list[int]:
        """Return the indices of the next batch."""
        batch = self._sampler.next_batch(self._end)
        if batch is None:
            raise StopIteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch handed out."""
        return {"end": self._end, "sampler": self._sampler.handed_out()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the last batch handed out."""
        self._end = state_dict["end"]
        self._sampler.load_state_dict(state_dict["sampler"])
