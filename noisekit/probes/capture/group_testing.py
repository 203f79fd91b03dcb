r"""Which example every row of a tensor depends on, by group testing.

A computation is run again and again on the whole batch, with the inputs of half of the
examples replaced by those of others: in run ``k`` of the examples whose number has bit
``k`` set, then of all others. What depends on example ``e`` alone never changes in a
run that leaves ``e`` as it is. Any two examples differ in some bit, so that a row that
depends on another example, or on a second one, changes where it must not:
``2 ⌈log₂ B⌉`` runs tell all ``B²`` pairs. Shapes and batch size stay what they were.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1000
"""Units of the last place of the largest value that rounding may make up; a coupling
weaker than that has no effect on what is read either."""


def example_groups(num_examples: int) -> Iterator[tuple[Tensor, int]]:
    """Yield which examples to replace ``(B,)``, and by which neighbour, for every run.

    Runs come in pairs: a group, then all other examples.
    """
    numbers = torch.arange(num_examples)
    for bit in range(math.ceil(math.log2(num_examples))):
        group = (numbers >> bit & 1).bool()
        # Another neighbour for every bit: a replacement may happen to be equal.
        neighbour = 1 + bit % (num_examples - 1)
        yield group, neighbour
        yield ~group, neighbour


def replace_examples(
    tensor: Tensor, group: Tensor, neighbour: int, axis: int
) -> Tensor:
    """Return ``tensor`` with the examples of ``group`` replaced by their neighbours.

    By whole examples of the same batch, which is valid for token numbers and masks too.
    """
    source = torch.arange(len(group))
    source[group] = (source[group] + neighbour) % len(group)
    return tensor.index_select(axis, source.to(tensor.device))


@dataclass(frozen=True, slots=True)
class Dependence:
    """What a group test has found of one tensor.

    Attributes:
        fixed_shape: Whether its shape does not depend on the examples' values.
        changes: Whether it depends on the examples at all.
        coupled: Whether one of its elements depends on two examples.
        axes: Axes along which entry ``i`` depends on example ``i`` alone.
    """

    fixed_shape: bool
    changes: bool
    coupled: bool
    axes: tuple[int, ...]


class DependenceTest:
    """Follows one tensor through the runs of a group test.

    Attributes:
        base: The tensor for the batch as it is.
    """

    def __init__(self, base: Tensor, num_examples: int) -> None:
        """Start a test.

        Args:
            base: The tensor for the batch as it is.
            num_examples: Examples of the batch.
        """
        self.base = base.detach()
        sizes = enumerate(base.shape)
        self._axes = [axis for axis, size in sizes if size == num_examples]
        none = torch.zeros((), dtype=torch.bool, device=base.device)
        self._misplaced = dict.fromkeys(self._axes, none)
        self._changed, self._coupled = none, none
        self._of_group: Tensor | None = None
        self._same_shape = True
        self._allowed = _rounding(self.base)

    def note(self, value: Tensor, group: Tensor) -> None:
        """Take in the tensor of the run in which ``group`` was replaced."""
        if value.shape != self.base.shape:
            self._same_shape = False
            return
        changed = self.differs(value)
        self._changed = self._changed | changed.any()
        kept = ~group.to(changed.device)
        for axis in self._axes:
            rows = changed.movedim(axis, 0).flatten(1).any(1)  # (B,)
            self._misplaced[axis] = self._misplaced[axis] | (rows & kept).any()
        if self._of_group is None:
            self._of_group = changed
        else:  # the second run of a pair: all other examples were replaced
            self._coupled = self._coupled | (self._of_group & changed).any()
            self._of_group = None

    def differs(self, value: Tensor) -> Tensor:
        """Return where ``value`` is not what it was, element by element."""
        if self.base.is_floating_point() or self.base.is_complex():
            both_nan = self.base.isnan() & value.isnan()
            return ~((value - self.base).abs() <= self._allowed) & ~both_nan
        return value != self.base

    def flags(self) -> Tensor:
        """Return all that is known as booleans, for one transfer to the host.

        Whether anything changed, whether an element depends on two examples, and by
        axis of as many entries as examples: whether entry ``i`` depends on another
        example than ``i``.
        """
        return torch.stack(
            [self._changed, self._coupled, *(self._misplaced[a] for a in self._axes)]
        )

    def result(self, flags: list[bool]) -> Dependence:
        """Return what the flags, now on the host, say of the tensor."""
        changed, coupled, *misplaced = flags
        axes = zip(self._axes, misplaced, strict=True)
        ordered = tuple(axis for axis, wrong in axes if changed and not wrong)
        return Dependence(self._same_shape, changed, coupled, ordered)


def _rounding(base: Tensor) -> Tensor:
    """By how much values may differ without having changed.

    Kernels that get another number of rows, as behind a router, round differently.
    """
    finite = base.abs().nan_to_num(0.0, 0.0, 0.0)
    if not base.numel() or not finite.is_floating_point():
        return finite.new_zeros(())
    eps = torch.finfo(finite.dtype).eps
    allowed: Tensor = min(_ROUNDING * eps, eps**0.5) * finite.amax()
    return allowed


def dependences(tests: Sequence[DependenceTest]) -> list[Dependence]:
    """Return the results of many tests, by one transfer to the host."""
    flags = [test.flags() for test in tests]
    if not flags:
        return []
    known = iter(torch.cat([f.to(flags[0].device) for f in flags]).tolist())
    return [
        test.result([next(known) for _ in range(len(own))])
        for test, own in zip(tests, flags, strict=True)
    ]
