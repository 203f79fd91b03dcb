"""Policies that are functions of the position alone: constant, table, growth.

The two named after papers are growth with the paper's rule for the learning rate.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.core.settings import Hint, Positive, PositiveInt
from noisekit.policies.point import At, check_interval, num_reached
from noisekit.policies.policy import Decision, Observation, Policy, State

GrowthFactor = Annotated[
    float, Gt(1), Lt(math.inf), Hint(advice="use Table for sizes that fall")
]


class Scheduled(Policy):
    """Base of policies whose decision is a function of the position alone."""

    @abstractmethod
    def decide(self, position: Observation) -> Decision:
        """Return what holds for the update that starts at the position."""

    def start(self) -> State:
        """Return an empty state: the position tells all."""
        return {}

    def next(self, state: State, observation: Observation) -> tuple[State, Decision]:
        """Decide by the position."""
        return state, self.decide(observation)


@dataclass(frozen=True)
class Constant(Scheduled):
    """The same batch size throughout.

    Attributes:
        batch_size: Examples per update.
    """

    name = "constant"
    rule = "m is constant"

    batch_size: PositiveInt

    def bounds(self) -> tuple[int, int]:
        """Return the batch size twice."""
        return self.batch_size, self.batch_size

    def decide(self, position: Observation) -> Decision:
        """Return the batch size."""
        return Decision(self.batch_size, reason="constant")


@dataclass(frozen=True)
class Table(Scheduled):
    """Stated batch sizes, one after the other, at stated points or intervals.

    Attributes:
        sizes: Examples per update, from the start on.
        at: Where the second size begins, the third, and so on.
        every: The length of each, in place of ``at``.
        cyclic: With ``every``, whether the first size follows the last one.

    Raises:
        UsageError: If not exactly one of ``at`` and ``every`` is given, the points are
            not one fewer than the sizes, or ``cyclic`` has no ``every``.

    Example:
        >>> import noisekit as nk
        >>> policy = nk.Table((32, 512), at=[nk.At(epochs=10)])
        >>> policy.decide(nk.Observation(epochs=10)).batch_size
        512
    """

    name = "table"
    rule = "m is the k-th of the sizes after k changes"

    sizes: tuple[int, ...]
    _: KW_ONLY
    at: tuple[At, ...] = ()
    every: At | None = None
    cyclic: bool = False

    def __post_init__(self) -> None:
        """Check the sizes and that points and sizes agree."""
        _as_tuples(self, "sizes", "at")
        Policy.__post_init__(self)
        if not self.sizes or any(_not_a_size(size) for size in self.sizes):
            raise UsageError(
                f"sizes needs batch sizes of 1 or more, got {self.sizes!r}."
            )
        check_changes(self.at, self.every)
        if self.cyclic and self.every is None:
            raise UsageError(
                "cyclic=True needs every=, the length of each size, got at=; give "
                "every=, or list the sizes as often as they occur."
            )
        if self.at and len(self.at) != len(self.sizes) - 1:
            raise UsageError(
                f"at needs one point fewer than there are sizes, got {len(self.at)} "
                f"points for {len(self.sizes)} sizes: the first size begins at 0."
            )

    def bounds(self) -> tuple[int, int]:
        """Return the smallest and the largest of the sizes."""
        return min(self.sizes), max(self.sizes)

    def decide(self, position: Observation) -> Decision:
        """Return the size whose turn it is."""
        turn = num_reached(position, self.at, self.every)
        last = len(self.sizes) - 1
        place = turn % len(self.sizes) if self.cyclic else min(turn, last)
        return Decision(self.sizes[place], reason=f"size {place + 1} of {last + 1}")


class Growing(Scheduled):
    """Base of geometric growth: ``min(⌊m_0 r^k⌋, max)`` after ``k`` changes."""

    batch_size: PositiveInt
    factor: GrowthFactor
    max: PositiveInt
    at: tuple[At, ...]
    every: At | None

    def __post_init__(self) -> None:
        """Check the settings and their order."""
        _as_tuples(self, "at")
        Policy.__post_init__(self)
        check_changes(self.at, self.every)
        if self.max < self.batch_size:
            raise BatchSizeError(
                f"max needs to be at least the batch size {self.batch_size}, got "
                f"{self.max}."
            )

    def bounds(self) -> tuple[int, int]:
        """Return the first size and the last, or ``max`` where growth has no end."""
        last = self.max if self.every is not None else self.size_after(len(self.at))
        return self.batch_size, last

    def size_after(self, num_changes: int) -> int:
        """Return the batch size after so many changes."""
        return _grown(self.batch_size, self.factor, self.max, num_changes)


@dataclass(frozen=True)
class Growth(Growing):
    r"""Geometric growth, ``m_k = min(⌊m_0 r^k⌋, max)`` after ``k`` changes.

    The product is floored, not each step: 1.1 from 100 gives 161 after five changes,
    where flooring at each step would give 160.

    Attributes:
        batch_size: ``m_0``, examples per update at the start.
        factor: ``r``, above 1.
        at: Points of the changes.
        every: Interval between changes, in place of ``at``.
        max: Largest batch size.
        beyond: What happens to growth that ``max`` forbids: nothing (``"stay"``), or
            the learning rate falls instead (``"rate"``), by ``max / (m_0 r^k)``.

    Raises:
        UsageError: If not exactly one of ``at`` and ``every`` is given, or ``max`` is
            below ``batch_size``.

    Example:
        >>> import noisekit as nk
        >>> policy = nk.Growth(64, factor=4, every=nk.At(epochs=10), max=512)
        >>> [policy.decide(nk.Observation(epochs=e)).batch_size for e in (9, 10, 20)]
        [64, 256, 512]
    """

    name = "growth"
    rule = "m = min(floor(m0 r^k), max) after k changes"

    batch_size: PositiveInt
    _: KW_ONLY
    factor: GrowthFactor
    max: PositiveInt
    at: tuple[At, ...] = ()
    every: At | None = None
    beyond: Literal["stay", "rate"] = "stay"

    def decide(self, position: Observation) -> Decision:
        """Return the size after the changes so far."""
        changes = num_reached(position, self.at, self.every)
        size = self.size_after(changes)
        rate = 1.0
        if self.beyond == "rate" and size == self.max:
            rate = min(1.0, size / self.batch_size * self.factor**-changes)
        return Decision(size, rate, reason=_count(changes))


@dataclass(frozen=True)
class AdaBatch(Growing):
    r"""AdaBatch: batch size and rate change together, as a decayed baseline asks.

    After ``k`` changes the batch is ``m_k = min(⌊m_0 r^k⌋, max)`` and the rate factor
    ``d^k m_k / m_0``: the rate *per example* falls as that of a constant batch whose
    rate is multiplied by the decay ``d``. With the paper's ``d = 0.375`` and ``r = 2``
    the rate is multiplied by 0.75 at each change. At ``max`` only the rate changes.

    The authors' program floors the batch at each change, and takes the rate's factor as
    it is given; both agree with this where ``r`` is an integer.

    Attributes:
        batch_size: ``m_0``, examples per update at the start.
        max: Largest batch size, such as the examples that there are.
        every: Interval between changes; the paper's is 20 epochs.
        at: Points of the changes, in place of ``every``.
        factor: ``r``, of the batch size.
        decay: ``d``, of the baseline's rate.
        coupled: ``False`` leaves out ``m_k / m_0``: the rate then falls as the
            baseline's while the batch grows, a control that the paper argues against.

    Raises:
        UsageError: As for ``Growth``.

    Source:
        Devarakonda, Naumov and Garland 2017, arXiv:1712.02029.

    Example:
        >>> import noisekit as nk
        >>> policy = nk.AdaBatch(128, max=50_000)
        >>> after = policy.decide(nk.Observation(epochs=20))
        >>> after.batch_size, after.rate_factor
        (256, 0.75)
    """

    name = "adabatch"
    rule = (
        "after k changes m = min(floor(m0 r^k), max), rate = rate0 d^k m / m0: the "
        "rate per example falls as that of a constant batch with decay d"
    )
    sources = ("devarakonda2017adabatch",)

    batch_size: PositiveInt
    _: KW_ONLY
    max: PositiveInt
    every: At | None = None
    at: tuple[At, ...] = ()
    factor: GrowthFactor = 2.0
    decay: Positive = 0.375
    coupled: bool = True

    def __post_init__(self) -> None:
        """Take the paper's interval where none is given, and check as growth does."""
        if self.every is None and not self.at:
            object.__setattr__(self, "every", At(epochs=20))
        Growing.__post_init__(self)

    def decide(self, position: Observation) -> Decision:
        """Return the size after the changes so far, and the rate that goes with it."""
        changes = num_reached(position, self.at, self.every)
        size = self.size_after(changes)
        coupling = size / self.batch_size if self.coupled else 1.0
        rate = self.decay**changes * coupling
        return Decision(size, rate, reason=_count(changes))


@dataclass(frozen=True)
class GrowInsteadOfDecay(Growth):
    r"""Grow the batch by what the learning rate would have been divided by.

    Scale the rate by ``1/r`` or the batch by ``r``: the scale of SGD's noise
    ``η N / (m (1 - β))`` is the same. Beyond ``max`` the rate falls instead. The
    paper keeps ``max`` below about a tenth of the training set.

    Attributes:
        batch_size: ``m_0``, examples per update at the start.
        factor: ``r``, the paper's is 5.
        at: Where the rate would have been decayed.
        every: Interval between changes, in place of ``at``.
        max: Largest batch size.
        beyond: ``"rate"``: what ``max`` forbids the rate takes over.

    Raises:
        UsageError: As for ``Growth``.

    Source:
        Smith, Kindermans, Ying and Le 2018, arXiv:1711.00489.

    Example:
        >>> import noisekit as nk
        >>> drops = [nk.At(epochs=60), nk.At(epochs=120), nk.At(epochs=160)]
        >>> policy = nk.GrowInsteadOfDecay(640, at=drops, max=5120)
        >>> last = policy.decide(nk.Observation(epochs=120))
        >>> last.batch_size, round(last.rate_factor, 4)
        (5120, 0.32)
    """

    name = "grow_instead_of_decay"
    rule = (
        "m = min(floor(m0 r^k), max) where the rate would be divided by r for the k-th "
        "time; beyond max the rate is divided"
    )
    sources = ("smith2018dont",)

    _: KW_ONLY
    factor: GrowthFactor = 5.0
    max: PositiveInt
    beyond: Literal["stay", "rate"] = "rate"


def check_changes(at: tuple[At, ...], every: At | None) -> None:
    """Check that changes are given as points or as an interval.

    Raises:
        UsageError: If both or neither are given, a point is no ``At``, points are on
            several clocks or out of order.
    """
    if bool(at) == (every is not None):
        raise UsageError(
            "changes need either at= (points) or every= (an interval), got "
            f"{'both' if at else 'neither'}; write every=At(epochs=20), for example."
        )
    check_interval("every", every)
    if any(not isinstance(point, At) for point in at):
        raise UsageError(f"at needs points such as At(epochs=60), got {at!r}.")
    if len({point.clock for point in at}) > 1:
        raise UsageError("at needs points on one clock, got several: use one of them.")
    amounts = [point.amount for point in at]
    if sorted(amounts) != amounts:
        raise UsageError(f"at needs points in ascending order, got {amounts}.")


@lru_cache(maxsize=4096)
def _grown(batch_size: int, factor: float, largest: int, num_changes: int) -> int:
    # Beyond this many changes the largest holds; powers of fractions would be slow.
    enough = math.ceil(math.log(largest / batch_size, factor)) + 1
    # Of the decimal number as written: 100 * 1.4 ** 2 is below 196 in floats.
    product = batch_size * Fraction(str(factor)) ** min(num_changes, enough)
    return min(math.floor(product), largest)


def _as_tuples(settings: object, *names: str) -> None:
    """Keep sequences as tuples, so that the frozen value can be hashed."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            object.__setattr__(settings, name, tuple(value))


def _not_a_size(size: object) -> bool:
    return not isinstance(size, int) or isinstance(size, bool) or size < 1


def _count(changes: int) -> str:
    return f"after {changes} change{'' if changes == 1 else 's'}"
