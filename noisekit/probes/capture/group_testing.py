r"""Which example every row of a tensor depends on, by group testing.

A computation is run again and again on the whole batch, each time with the inputs of a
group of the examples replaced by those of others. What depends on example ``e`` alone
never changes in a run that leaves ``e`` as it is, so that a row that depends on another
example, or on a second one, changes where it must not. Shapes and batch size stay.

All ``B²`` pairs are told apart by ``k`` runs with ``C(k, k/2) >= B``: examples are in
different sets of ``k/2`` runs each, of which none contains another (Sperner 1928).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import torch
from torch import Tensor

_ROUNDING = 1000
"""Units of the last place of the largest value that rounding may make up; a coupling
weaker than that has no effect on what is read either."""


@dataclass(frozen=True, slots=True)
class GroupDesign:
    """Which examples are replaced in which run, each of them equally often.

    Attributes:
        groups: By run: the examples that are replaced ``(B,)``.
        neighbours: By run: how far away their replacements are.
    """

    groups: tuple[Tensor, ...]
    neighbours: tuple[int, ...]

    @classmethod
    def of_all_pairs(cls, num_examples: int) -> "GroupDesign":
        """The fewest runs that tell every example from every other one."""
        num_runs = 2
        while math.comb(num_runs, num_runs // 2) < num_examples:
            num_runs += 1
        replaced = torch.zeros(num_runs, num_examples, dtype=torch.bool)
        every = combinations(range(num_runs), num_runs // 2)
        step = math.comb(num_runs, num_runs // 2) // num_examples
        for example, runs in enumerate(islice(every, 0, step * num_examples, step)):
            replaced[list(runs), example] = True
        return cls._of(list(replaced))

    @classmethod
    def of_complements(cls, num_examples: int) -> "GroupDesign":
        """A group and then all others, for every bit of the examples' numbers.

        Both runs together make up twice the batch: sums over examples add up.
        """
        numbers, num_bits = (
            torch.arange(num_examples),
            math.ceil(math.log2(num_examples)),
        )
        groups = [(numbers >> bit & 1).bool() for bit in range(num_bits)]
        both = [part for group in groups for part in (group, ~group)]
        return cls._of(both)

    @classmethod
    def of_halves(cls, num_examples: int, generator: torch.Generator) -> "GroupDesign":
        """A random half and the other one, which show whatever couples many pairs."""
        group = torch.zeros(num_examples, dtype=torch.bool)
        drawn = torch.randperm(num_examples, generator=generator)
        group[drawn[: num_examples // 2]] = True
        return cls._of([group, ~group])

    @classmethod
    def _of(cls, groups: Sequence[Tensor]) -> "GroupDesign":
        # Another neighbour for every second run: a replacement may happen to be equal.
        others = len(groups[0]) - 1
        return cls(
            tuple(groups), tuple(1 + n // 2 % others for n in range(len(groups)))
        )

    def of_one_example(self, runs: Tensor) -> Tensor:
        """Whether what changes in a set of runs may depend on one example alone.

        Args:
            runs: Sets as sums of ``2**n`` over their runs ``(U,)``.
        """
        bits = torch.arange(len(self.groups), device=runs.device)
        own = (torch.stack(self.groups).to(runs.device).long() << bits[:, None]).sum(0)
        return ((runs[:, None] & ~own) == 0).any(1)

    def runs(self) -> Iterator[tuple[Tensor, int]]:
        """Yield which examples to replace ``(B,)``, and by which neighbour."""
        yield from zip(self.groups, self.neighbours, strict=True)


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

    Along axes that may be the examples', whole rows are compared. Single elements are
    where there is no such axis, or where no row of one is an example's own: only they
    tell examples in another order from examples that are coupled.

    Attributes:
        base: The tensor for the batch as it is.
    """

    def __init__(
        self, base: Tensor, design: GroupDesign, *, elements: bool = False
    ) -> None:
        """Start a test.

        Args:
            base: The tensor for the batch as it is.
            design: The runs that follow, in this order.
            elements: Whether to compare elements, whatever axes there are.
        """
        self.base = base.detach()
        self._design, self._num_runs = design, 0
        num_examples, sizes = len(design.groups[0]), enumerate(base.shape)
        self._axes = [axis for axis, size in sizes if size == num_examples]
        none = torch.zeros((), dtype=torch.bool, device=base.device)
        self._misplaced = dict.fromkeys(self._axes, none)
        self._changed = none
        self.by_elements = elements or not self._axes or not base.numel()
        # The runs in which each element changes, as a sum of powers of two.
        self._runs = torch.zeros(
            base.shape if self.by_elements else (),
            dtype=torch.int64,
            device=base.device,
        )
        self._same_shape = True
        self._allowed = _rounding(self.base)

    def note(self, value: Tensor, group: Tensor) -> None:
        """Take in the tensor of the run in which ``group`` was replaced."""
        run, self._num_runs = self._num_runs, self._num_runs + 1
        if value.shape != self.base.shape:
            self._same_shape = False
            return
        kept = ~group.to(value.device)
        changed = self.differs(value) if self.by_elements else None
        if changed is not None:
            self._runs += changed.long() << run
            self._changed = self._changed | changed.any()
        for axis in self._axes:
            if changed is None:
                rows = self._rows_that_differ(value, axis)
                self._changed = self._changed | rows.any()
            else:
                rows = _any_by_row(changed, axis)
            self._misplaced[axis] = self._misplaced[axis] | (rows & kept).any()

    def differs(self, value: Tensor) -> Tensor:
        """Return where ``value`` is not what it was, element by element."""
        if self.base.is_floating_point() or self.base.is_complex():
            both_nan = self.base.isnan() & value.isnan()
            return ~((value - self.base).abs() <= self._allowed) & ~both_nan
        return value != self.base

    def _rows_that_differ(self, value: Tensor, axis: int) -> Tensor:
        """Return in which rows along ``axis`` something differs ``(B,)``.

        Rows with a NaN count as such; elements decide then.
        """
        others = [dim for dim in range(value.dim()) if dim != axis]
        if not (self.base.is_floating_point() or self.base.is_complex()):
            return _any_by_row(value != self.base, axis)
        difference = (value.detach() - self.base).abs()
        largest = difference.amax(others) if others else difference
        return ~(largest <= self._allowed)

    def flags(self) -> Tensor:
        """Return all that is known as booleans, for one transfer to the host.

        Whether anything changed, whether an element depends on two examples, and by
        axis of as many entries as examples: whether entry ``i`` depends on another
        example than ``i``.
        """
        sets: Tensor = self._runs.unique()  # type: ignore[no-untyped-call]
        coupled = ~self._design.of_one_example(sets).all()
        return torch.stack(
            [self._changed, coupled, *(self._misplaced[a] for a in self._axes)]
        )

    def result(self, flags: list[bool]) -> Dependence:
        """Return what the flags, now on the host, say of the tensor."""
        changed, coupled, *misplaced = flags
        axes = zip(self._axes, misplaced, strict=True)
        ordered = tuple(axis for axis, wrong in axes if changed and not wrong)
        return Dependence(self._same_shape, changed, coupled, ordered)


def _any_by_row(flags: Tensor, axis: int) -> Tensor:
    """Whether any flag of a row along ``axis`` is set ``(B,)``."""
    return flags.movedim(axis, 0).reshape(flags.shape[axis], -1).any(1)


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
