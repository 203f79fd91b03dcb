"""Whether a model treats examples independently, established on a copy of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.errors import ModelCopyError
from noisekit.core.layers.per_example import Site
from noisekit.probes.capture.calls import tensors_of
from noisekit.probes.capture.copied_runs import CopiedRuns, Inputs, Trace
from noisekit.probes.capture.group_testing import (
    Dependence,
    DependenceTest,
    GroupDesign,
    dependences,
    replace_examples,
)
from noisekit.probes.capture.step_record import CallKey

_ADDITIVITY = 1e-3
"""By how much a loss inside the model may miss the sum over its examples."""


@dataclass(frozen=True, slots=True)
class Independence:
    """What a model's runs on other batches have shown.

    Attributes:
        inputs: By call of a site: what each tensor among its inputs depends on.
        outputs: The same of its outputs.
        coupled: The model's outputs, by position, whose values for an example depend on
            others, each with the reason.
        refusal: Why no example has a gradient of its own, whatever output is used.
        unchecked: Why nothing is known; empty where the runs could be made.
        axes: By position of an output: the axis of the examples, where there is one.
        established: Whether the outputs changed with the inputs; those of a layer
            that starts at zero do not.
        smaller: By call: shapes of its inputs for one example less, where those were
            needed.
    """

    inputs: Mapping[CallKey, list[Dependence]] = field(default_factory=dict)
    outputs: Mapping[CallKey, list[Dependence]] = field(default_factory=dict)
    coupled: Mapping[int, str] = field(default_factory=dict)
    refusal: str = ""
    unchecked: str = ""
    axes: Mapping[int, int] = field(default_factory=dict)
    established: bool = False
    smaller: Mapping[CallKey, list[torch.Size]] = field(default_factory=dict)


CHECK_EVERY = 1000
"""Most passes that are read between two checks of the independence of examples."""

_FREE_CHECKS = 8
"""Checks because of changes that are made whatever the number of passes."""

COUPLED = "outputs for an example depend on the others in the batch"
NOT_A_SUM = (
    "the loss inside the model is not a sum over the examples of the batch, such as a "
    "contrastive loss or a mean over targets that do not all count"
)
_VARYING = "the shape of the model's outputs depends on the values of its inputs"


class _UnrepeatableError(Exception):
    """Equal runs have given different values."""


class _VaryingError(Exception):
    """The model's outputs have another shape for other examples."""


class _TraceTest:
    """Group tests of all tensors of a run, which it is shown while it runs."""

    def __init__(
        self,
        base: Trace,
        whole: Sequence[Tensor],
        design: GroupDesign,
        *,
        elements: bool,
    ) -> None:
        def started(tensors: Sequence[Tensor]) -> list[DependenceTest]:
            return [DependenceTest(t, design, elements=elements) for t in tensors]

        self._inputs = {key: started(found) for key, found in base.inputs.items()}
        self._outputs = {key: started(found) for key, found in base.outputs.items()}
        self._whole = started(whole)
        self._used = [tensor.requires_grad for tensor in whole]
        self._losses: list[list[Tensor]] = [[] for _ in whole]
        self._lost: set[CallKey] = set()
        self._missing: set[CallKey] = set()
        self._group: Tensor | None = None
        self._differs = False

    def start(self, group: Tensor | None) -> None:
        """Begin the run in which ``group`` is replaced; ``None`` for equal inputs."""
        self._group, self._missing = group, set(self._inputs)

    def note_call(
        self, key: CallKey, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Take in a call of the run."""
        self._missing.discard(key)
        for own, tensors in ((self._inputs, inputs), (self._outputs, outputs)):
            tests = own.get(key, [])
            if len(tensors) != len(tests):
                self._lost.add(key)
            else:
                self._note(tests, tensors)

    def _note(self, tests: Sequence[DependenceTest], tensors: Sequence[Tensor]) -> None:
        for test, tensor in zip(tests, tensors, strict=True):
            if self._group is not None:
                test.note(tensor, self._group)
            elif test.base.shape != tensor.shape or bool(test.differs(tensor).any()):
                self._differs = True

    def end(self, whole: Sequence[Tensor]) -> None:
        """Take in the model's outputs.

        Raises:
            _VaryingError: If an output that training may use has another shape.
            _UnrepeatableError: If equal inputs have given anything else.
        """
        if self._differs:
            raise _UnrepeatableError
        self._lost |= self._missing
        if [t.shape for t in whole] != [t.base.shape for t in self._whole]:
            raise _VaryingError
        self._note(self._whole, whole)
        if self._differs:
            raise _UnrepeatableError
        for position, tensor in enumerate(whole):
            if tensor.dim() == 0 and self._group is not None:
                self._losses[position].append(tensor.detach().double())

    def _tests(self) -> list[DependenceTest]:
        calls = (*self._inputs.values(), *self._outputs.values())
        return [*(test for own in calls for test in own), *self._whole]

    def is_suspicious(self) -> bool:
        """Whether anything was found that random numbers would explain as well."""
        return bool(self._lost) or any(
            one.changes and (one.coupled or not one.axes)
            for one in dependences(self._tests())
        )

    def is_coarse(self) -> bool:
        """Whether rows were compared where only elements tell."""
        tests = self._tests()
        return any(
            one.changes and not one.axes and not test.by_elements
            for test, one in zip(tests, dependences(tests), strict=True)
        )

    def result(self, *, sums: bool) -> Independence:
        """Return what was found.

        Args:
            sums: Whether all that belongs to an example was replaced, so that a scalar
                output can be asked whether it is a sum.
        """
        inputs, outputs = self._of_calls(self._inputs), self._of_calls(self._outputs)
        coupled, whole = {}, dependences(self._whole)
        for position, found in enumerate(whole):
            if not self._used[position]:
                continue
            if found.coupled and self._whole[position].base.dim():
                coupled[position] = COUPLED
            elif sums and not self._adds_up(position):
                coupled[position] = NOT_A_SUM
        return Independence(
            inputs,
            outputs,
            coupled,
            axes={i: found.axes[0] for i, found in enumerate(whole) if found.axes},
            established=any(found.changes for found in whole),
        )

    def _of_calls(
        self, tests: Mapping[CallKey, list[DependenceTest]]
    ) -> dict[CallKey, list[Dependence]]:
        lost = Dependence(fixed_shape=False, changes=True, coupled=False, axes=())
        return {
            key: [lost] * len(own) if key in self._lost else dependences(own)
            for key, own in tests.items()
        }

    def _adds_up(self, position: int) -> bool:
        """Whether a scalar output is a sum over examples.

        A group and all others have been replaced by the batch's own examples, each
        once, so that both runs together make up twice the batch.
        """
        losses, base = self._losses[position], self._whole[position].base
        if not losses:
            return True
        changes = (torch.stack(losses) - base.double()).view(-1, 2)
        rounding = 64 * torch.finfo(base.dtype).eps * base.double().abs()
        allowed = _ADDITIVITY * changes.abs().sum(1) + rounding
        return not bool((changes.sum(1).abs() > allowed).any())


class IndependenceCheck:
    """Runs copies of a model on a batch with some of its examples replaced.

    The model itself is only read. Costs about ``log₂ B + 4`` forward passes of the
    batch and as many copies of the model, one at a time; 3 where the result is only to
    be confirmed.

    Attributes:
        num_runs: Forward passes that were made.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        inputs: Inputs,
        *,
        num_examples: int,
        batch_dim: int,
        halves: torch.Generator | None = None,
    ) -> None:
        """Prepare the check.

        Args:
            model: The model.
            sites: Whose calls are followed.
            inputs: What it was called with.
            num_examples: Examples of the batch.
            batch_dim: Their axis.
            halves: Draws two halves of the batch, to confirm by these alone what all
                pairs of examples have shown before.
        """
        self._runs = CopiedRuns(model, sites)
        self._inputs = inputs
        self._leaves, self._structure = pytree.tree_flatten(inputs)
        self._num_examples = num_examples
        self._batch_dim = batch_dim
        self._halves = halves
        self._per_example = [
            position
            for position, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor)
            and leaf.dim() > batch_dim
            and leaf.shape[batch_dim] == num_examples
        ]

    @property
    def num_runs(self) -> int:
        """Forward passes that were made."""
        return self._runs.num_runs

    def result(self) -> Independence:
        """Return what can be established; never raises because of the model."""
        if any(tensor.is_meta for tensor in tensors_of(self._inputs)):
            return self._by_shapes("tensors on the meta device have no values")
        reasons = []
        for replaced in self._ways_to_replace():
            try:
                return self._settled(replaced)
            except ModelCopyError as error:
                return Independence(unchecked=str(error))
            except _VaryingError:
                reasons.append(_VARYING)
            except _UnrepeatableError:
                return self._by_shapes("equal runs of the model differ")
            except Exception as error:  # a model of certain batches only
                kind, said = type(error).__name__, str(error).partition("\n")[0]
                reasons.append(f"a run on other examples failed ({kind}: {said})")
        if reasons and reasons[-1] is _VARYING:
            return Independence(refusal=_VARYING)
        return self._by_shapes((reasons or ["no input has the examples' axis"])[-1])

    def _ways_to_replace(self) -> list[list[int]]:
        """Sets of inputs to replace, the fullest first.

        Masks and token numbers may decide shapes and routes; left as they are, the
        rest can still be told.
        """
        every = self._per_example
        dtypes = [
            leaf.dtype if isinstance(leaf, Tensor) else None for leaf in self._leaves
        ]
        ways = [
            every,
            [i for i in every if dtypes[i] is not torch.bool],
            [i for i in every if self._leaves[i].is_floating_point()],
        ]
        return [way for n, way in enumerate(ways) if way and way not in ways[:n]]

    def _settled(self, replaced: Sequence[int]) -> Independence:
        """The group test, with the benefit of the doubt for inputs of two readings."""
        found = self._group_test(replaced)
        doubtful = self._doubtful(replaced)
        if found.coupled and doubtful:
            kept = self._group_test([i for i in replaced if i not in doubtful])
            found = found if kept.coupled else kept
        decided = all(d.changes for own in found.inputs.values() for d in own)
        return found if decided else replace(found, smaller=self._smaller_shapes())

    def _doubtful(self, replaced: Sequence[int]) -> list[int]:
        """Inputs that all examples may share, such as a mask over as many positions."""
        count = self._num_examples
        return [
            i
            for i in replaced
            if i != self._per_example[0]
            and list(self._leaves[i].shape).count(count) > 1
        ]

    def _group_test(self, replaced: Sequence[int]) -> Independence:
        base = Trace()
        whole = self._runs.run(self._inputs, base)
        design = self._design(whole)
        test = self._tested(base, whole, replaced, design, elements=False)
        if test.is_suspicious():
            test.start(None)
            test.end(self._runs.run(self._inputs, test))
        if test.is_coarse():
            test = self._tested(base, whole, replaced, design, elements=True)
        return test.result(sums=list(replaced) == self._per_example)

    def _design(self, whole: Sequence[Tensor]) -> GroupDesign:
        """Complements where a loss among the outputs has to add up over examples."""
        if self._halves is not None:
            return GroupDesign.of_halves(self._num_examples, self._halves)
        if any(tensor.dim() == 0 and tensor.requires_grad for tensor in whole):
            return GroupDesign.of_complements(self._num_examples)
        return GroupDesign.of_all_pairs(self._num_examples)

    def _tested(
        self,
        base: Trace,
        whole: Sequence[Tensor],
        replaced: Sequence[int],
        design: GroupDesign,
        *,
        elements: bool,
    ) -> _TraceTest:
        """The test after all of its runs."""
        test = _TraceTest(base, whole, design, elements=elements)
        for group, neighbour in design.runs():
            leaves = list(self._leaves)
            for i in replaced:
                leaves[i] = replace_examples(
                    leaves[i], group, neighbour, self._batch_dim
                )
            inputs = pytree.tree_unflatten(leaves, self._structure)
            test.start(group)
            test.end(self._runs.run(inputs, test))
        return test

    def _smaller_shapes(self) -> dict[CallKey, list[torch.Size]]:
        """Shapes of the sites' inputs for one example less; none if that fails.

        They tell the axis of tensors that do not depend on the examples' values, such
        as the first state of a recurrent layer.
        """
        leaves = list(self._leaves)
        for i in self._per_example:
            if i not in self._doubtful(self._per_example):
                leaves[i] = leaves[i].narrow(self._batch_dim, 0, self._num_examples - 1)
        trace = Trace()
        try:
            self._runs.run(pytree.tree_unflatten(leaves, self._structure), trace)
        except Exception:  # a model of one batch size only, or one without a copy
            return {}
        return {key: [t.shape for t in found] for key, found in trace.inputs.items()}

    def _by_shapes(self, unchecked: str) -> Independence:
        return Independence(unchecked=unchecked, smaller=self._smaller_shapes())


class CheckSchedule:
    """When independence is established anew: at first, on changes, and then rarely."""

    def __init__(self) -> None:
        self._established: dict[object, bool] = {}
        self._num_passes = 0
        self._num_checks = 0
        self._next = 0

    def is_due(self, signature: object) -> bool:
        """Whether to check the pass that has just ended.

        Args:
            signature: What the pass called, and of which ranks its tensors were.
        """
        self._num_passes += 1
        changed = signature not in self._established
        # Where other modules are called at every step, not each can be checked.
        paid = self._num_checks < _FREE_CHECKS + self._num_passes // CHECK_EVERY
        return self._num_passes > self._next or (changed and paid)

    def is_established(self, signature: object) -> bool:
        """Whether an earlier check has told all, so that it is only to be confirmed."""
        return self._established.get(signature, False)

    def restart(self) -> None:
        """Check again: the model is another one."""
        self._established, self._next = {}, 0

    def checked_too(self, signature: object) -> None:
        """Take the last check for one of ``signature`` as well."""
        self._established.setdefault(signature, True)

    def checked(self, signature: object, *, established: bool) -> None:
        """Note a check, and whether it could tell anything."""
        self._established[signature] = established
        self._num_checks += 1
        n = self._num_passes
        # A layer that starts at zero hides what comes before it: soon again.
        self._next = n + min(max(1, (9 if established else 1) * n), CHECK_EVERY)
