"""Which axis of each captured tensor runs over the examples."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from noisekit.core.errors import LayerReadError
from noisekit.core.layers.batch_axis import MIXED, axis_of_examples
from noisekit.core.layers.replay import ModuleReplay
from noisekit.probes.capture.calls import inputs_of, kind_of_call
from noisekit.probes.capture.group_testing import Dependence
from noisekit.probes.capture.independence import (
    CheckSchedule,
    Independence,
    IndependenceCheck,
)
from noisekit.probes.capture.step_record import CallKey, CapturedCall


class ExampleAxes:
    """Knows the axis of the examples of every captured input.

    Established by runs of a copy of the model: see ``independence``. Sizes alone would
    take as many positions, queries or channels for as many examples. They decide where
    no such run could be made, and leave no doubt.

    Attributes:
        coupled: The model's outputs, by position, whose values for an example depend on
            others, each with the reason.
        of_outputs: By position of an output of the model: the axis of the examples.
        unchecked: Why nothing is known; empty where the runs could be made.
    """

    def __init__(self) -> None:
        self.coupled: Mapping[int, str] = {}
        self.of_outputs: Mapping[int, int] = {}
        self.unchecked = ""
        self._schedule = CheckSchedule()
        self._halves = torch.Generator().manual_seed(0)
        self._inputs: dict[CallKey, tuple[int | None, ...]] = {}
        self._outputs: dict[CallKey, tuple[int | None, ...]] = {}
        self._by_size: set[tuple[CallKey, int]] = set()
        self._meetings: dict[CallKey, tuple[int, ...]] = {}

    def of_meetings(self, name: str) -> list[tuple[int, ...]]:
        """Axes of the examples where a tensor without them meets them, in order."""
        return [axes for (own, _), axes in self._meetings.items() if own == name]

    def restart(self) -> None:
        """Check again: the model is another one."""
        self._schedule.restart()

    def establish(
        self,
        calls: Sequence[CapturedCall],
        check_by: Callable[[torch.Generator | None], IndependenceCheck],
    ) -> Independence | None:
        """Run copies of the model to see which rows are whose, where that is due.

        Args:
            calls: Of the pass that has just ended.
            check_by: Makes a check, by two halves where a generator is given.

        Returns:
            What is new; ``None`` where nothing is.
        """
        signature = frozenset(map(kind_of_call, calls))
        if not self._schedule.is_due(signature):
            return None
        if self._schedule.is_established(signature):
            found = check_by(self._halves).result()
            if self._agrees(calls, found):
                self._schedule.checked(signature, established=True)
                return None
        found = check_by(None).result()
        self._learn(calls, found)
        self._learn_meetings(found)
        self.coupled, self.unchecked = found.coupled, found.unchecked
        self.of_outputs = found.axes
        self._schedule.checked(signature, established=found.established)
        return found

    def leave_out(self, calls: Sequence[CapturedCall]) -> None:
        """Take the calls that are left for what was checked in the present pass."""
        self._schedule.checked_too(frozenset(map(kind_of_call, calls)))

    def _agrees(self, calls: Iterable[CapturedCall], found: Independence) -> bool:
        """Whether a check by halves contradicts nothing of what is known."""
        if found.refusal or found.unchecked != self.unchecked:
            return False
        if found.coupled.keys() - self.coupled.keys():
            return False
        keys = [captured.key for captured in calls]
        met = {key: found.inputs[key] for key in self._meetings if key in found.inputs}
        if any(
            d.changes and not set(self._meetings[k]) <= set(d.axes)
            for k, (d,) in met.items()
        ):
            return False
        return all(
            _agree(known.get(key), dependences.get(key, ()))
            for key in keys
            for known, dependences in (
                (self._inputs, found.inputs),
                (self._outputs, found.outputs),
            )
        )

    def _learn(self, calls: Iterable[CapturedCall], found: Independence) -> None:
        """Keep what was found of the inputs and outputs of ``calls``."""
        for captured in calls:
            key, site = captured.key, captured.site
            tensors = _example_inputs(captured)
            inputs, smaller = found.inputs.get(key, ()), found.smaller.get(key, ())
            known = []
            for position, tensor in enumerate(tensors):
                axes = site.rule.example_axes(site.module, tensor.shape, position)
                axis: int | None = None
                if position < len(inputs) and inputs[position].changes:
                    fitting = [a for a in inputs[position].axes if a in axes]
                    axis = fitting[0] if fitting else MIXED
                elif position < len(smaller):
                    axis = shrunk_axis(smaller[position], tensor.shape)
                else:
                    self._by_size.add((key, position))
                known.append(axis)
            self._inputs[key] = tuple(known)
            self._outputs[key] = tuple(
                (d.axes[0] if d.axes else MIXED) if d.changes else None
                for d in found.outputs.get(key, ())
            )

    def _learn_meetings(self, found: Independence) -> None:
        """Keep what was found where tensors without examples meet these."""
        self._meetings = {
            key: found.inputs[key][0].axes
            for key in sorted(found.inputs)
            if key not in self._inputs
        }

    def resolve(self, captured: CapturedCall) -> None:
        """Set the axes of the call's inputs and outputs.

        Raises:
            BatchSizeError: If sizes leave a doubt that nothing has settled.
            LayerReadError: If no input has an axis of the examples.
        """
        call = captured.call
        tensors = _example_inputs(captured)
        key = self._alike(captured.key)
        known = self._inputs.get(key, ())
        axes = [
            self._axis(captured, key, position, tensor.shape, known)
            for position, tensor in enumerate(tensors)
        ]
        if MIXED in axes and call.num_examples in tensors[axes.index(MIXED)].shape:
            raise LayerReadError("its rows are not the batch's examples in their order")
        if MIXED in axes or all(axis is None for axis in axes):
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensor"
            raise LayerReadError(
                f"its input has no axis of {call.num_examples} examples ({shapes})"
            )
        call.axes = tuple(axes)
        if call.num_examples > 1:
            call.output_order = self._outputs.get(key, ())

    def _alike(self, key: CallKey) -> CallKey:
        """The call itself, or one of its module if all of those are alike.

        A module may be called more often than it was: in longer loops, or again when a
        checkpoint is recomputed.
        """
        if key in self._inputs:
            return key
        others = [other for other in self._inputs if other[0] == key[0]]
        alike = len({self._inputs[other] for other in others}) == 1
        return others[0] if alike else key

    def _axis(
        self,
        captured: CapturedCall,
        key: CallKey,
        position: int,
        shape: torch.Size,
        known: tuple[int | None, ...],
    ) -> int | None:
        site, num_examples = captured.site, captured.call.num_examples
        told = position < len(known) and (key, position) not in self._by_size
        if told and num_examples > 1:
            axis = known[position]
            if axis is None or axis == MIXED:
                return axis
            return axis if shape[axis] == num_examples else None
        return axis_of_examples(
            shape,
            num_examples,
            among=site.rule.example_axes(site.module, shape, position),
            where=f"input {position} of {site.path or 'the model'}",
        )


def _agree(
    known: Sequence[int | None] | None, dependences: Sequence[Dependence]
) -> bool:
    """Whether axes that are known are among those that half of the pairs allow."""
    if known is None or len(known) > len(dependences):
        return False
    return all(
        axis == MIXED or not found.changes or axis in found.axes
        for axis, found in zip(known, dependences, strict=False)
    )


def _example_inputs(captured: CapturedCall) -> list[Tensor]:
    """A layer's only input, or every tensor that goes into a replayed module."""
    tensors = inputs_of(captured.call)
    replayed = isinstance(captured.site.rule, ModuleReplay)
    return tensors if replayed else tensors[:1]


def shrunk_axis(smaller: torch.Size, shape: torch.Size) -> int | None:
    """Return the one axis that differs between the smaller batch and this one."""
    if len(smaller) != len(shape):
        return None
    changed = [i for i, (a, b) in enumerate(zip(smaller, shape, strict=True)) if a != b]
    return changed[0] if len(changed) == 1 else None
