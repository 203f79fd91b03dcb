"""Where the graph of a forward pass broadcasts a tensor over the examples.

A tensor without an axis of examples, such as a table of positions, meets them in an
operation that broadcasts it. Its gradient is that operation's, summed over the
examples; before that sum every row is an example's own. Nothing is taken for granted:
all ways from the tensor into the graph have to lead through views to such operations,
and runs of a copy have to show that their results have the examples on the same axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from noisekit.core.layers.broadcast import unbroadcast

_VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("Alias", "Clone", "Permute", "Select", "Slice", "Squeeze", "T", "ToCopy"),
        *("Transpose", "UnsafeView", "Unsqueeze", "View", "ReshapeAlias"),
    )
) | {"SqueezeBackward1"}
"""Operations on one tensor whose backward passes need none of its values."""

_COPIES = frozenset(f"{name}Backward0" for name in ("Alias", "Clone", "ToCopy"))
"""Those of them that leave every entry where it was."""

_REPEATS = frozenset(("ExpandBackward0", "RepeatBackward0"))
"""Operations that only broadcast, the second perhaps more than that."""

_SUMS = {"AddBackward0": 1.0, "SubBackward0": -1.0}
"""Operations that broadcast, with the sign of their second operand."""


def source_node(tensor: Tensor) -> Node:
    """Return the node that the gradient of ``tensor`` arrives at."""
    return get_gradient_edge(tensor).node


@dataclass(frozen=True, slots=True)
class Meeting:
    """An operation that broadcasts a tensor over the examples.

    Attributes:
        node: The operation's node, which the examples' gradients enter.
        operand: Which of its operands the tensor is.
        views: Nodes from the operand to the tensor, in the order of a backward pass.
        result: The node of the first result with the examples' values, and the
            operand of it that the broadcast tensor is.
    """

    node: Node
    operand: int
    views: tuple[Node, ...]
    result: tuple[Node, int]

    @property
    def shape(self) -> torch.Size:
        """Of the operand."""
        if self.views:
            return _shape_of(self.views[0])
        below = self.node.next_functions[self.operand][0]
        variable = getattr(below, "variable", None)
        assert below is not None
        return variable.shape if isinstance(variable, Tensor) else _shape_of(below)

    def axes(self, num_examples: int) -> list[int]:
        """Axes of the result that may be the examples' and that the tensor lacks."""
        out, own = _shape_of(self.node), self.shape
        padded = (*[1] * (len(out) - len(own)), *own)
        sizes = list(zip(out, padded, strict=True))
        if any(before not in (1, size) for size, before in sizes):
            return []
        return [
            axis
            for axis, (size, before) in enumerate(sizes)
            if size == num_examples and before == 1
        ]

    def result_axis(self, axis: int) -> int:
        """Where the result has the axis ``axis`` of what enters it."""
        node, _ = self.result
        if node is self.node or node.name() == "CatBackward0":
            return axis
        return axis + len(_shape_of(node)) - len(_shape_of(self.node))

    def keeps(self, axis: int) -> bool:
        """Whether ``axis`` is still the examples' in the result."""
        node, _ = self.result
        if node.name() != "CatBackward0":
            return True
        dim: int = node._saved_dim  # type: ignore[attr-defined]
        return axis != dim % len(_shape_of(node))

    def reader(self, axis: int) -> "ExampleGradients":
        """Return what makes the examples' gradients of those that enter the node."""
        factor = 1.0
        if self.node.name() in _SUMS and self.operand == 1:
            alpha: Any = self.node._saved_alpha  # type: ignore[attr-defined]
            factor = _SUMS[self.node.name()] * alpha
        return ExampleGradients(axis, self.shape, factor, self.views)


@dataclass(frozen=True, slots=True)
class ExampleGradients:
    """Makes the gradients by example of a tensor that is broadcast over examples.

    Without the node that they enter: a hook on it must not keep its graph alive.

    Attributes:
        axis: Of the examples.
        shape: Of the operand that is broadcast.
        factor: By which the operation multiplies it.
        views: From the operand to the tensor.
    """

    axis: int
    shape: torch.Size
    factor: float
    views: tuple[Node, ...]

    def __call__(self, grad: Tensor) -> Tensor:
        """Return them, ``(N, *shape of the tensor)``."""
        rows = unbroadcast(grad.detach(), self.axis, self.shape)
        rows = rows if self.factor == 1.0 else rows * self.factor
        for node in self.views:
            rows = torch.stack([_through(node, row) for row in rows])
        return rows


def _through(node: Node, grad: Tensor) -> Tensor:
    """The backward pass of a view, which has no values to keep."""
    found = node(grad)  # type: ignore[operator]
    one: Tensor = found[0] if isinstance(found, tuple) else found
    return one


def _shape_of(node: Node) -> torch.Size:
    shape: torch.Size = node._input_metadata[0].shape
    return shape


@dataclass(slots=True)
class _Way:
    """From a source upward: views so far, then the node that has broadcast it."""

    source: str
    views: tuple[Node, ...] = ()
    broadcast: tuple[Node, int] | None = None


def _beyond(way: _Way, node: Node, operand: int) -> _Way | Meeting | None:
    """Where a way leads through one more node; ``None`` where that is not known."""
    name = node.name()
    if way.broadcast is None:
        if name in _VIEWS:
            return _Way(way.source, (node, *way.views))
        if name in _REPEATS:
            return _Way(way.source, way.views, (node, operand))
        if name in _SUMS:
            return Meeting(node, operand, way.views, (node, operand))
        return None
    if name in _COPIES:
        return _Way(way.source, way.views, way.broadcast)
    if name in _SUMS or name in ("MulBackward0", "CatBackward0"):
        return Meeting(*way.broadcast, way.views, (node, operand))
    return None


def meetings(
    roots: Sequence[Node], sources: Mapping[Node, str]
) -> dict[str, list[Meeting] | None]:
    """Return by source where it meets the examples; ``None`` where that is unclear.

    Sources that the graph does not contain are left out.

    Args:
        roots: Nodes of the outputs.
        sources: Names of the tensors by their nodes.
    """
    parents: dict[Node, list[tuple[Node, int]]] = {}
    waiting, seen = list(roots), set(roots)
    while waiting:
        node = waiting.pop()
        for operand, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            parents.setdefault(child, []).append((node, operand))
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    found: dict[str, list[Meeting] | None] = {}
    for source, name in sources.items():
        if source in seen:
            found[name] = _meetings_of(source, name, parents)
    return found


def _meetings_of(
    source: Node, name: str, parents: Mapping[Node, list[tuple[Node, int]]]
) -> list[Meeting] | None:
    """All meetings of one source in the order of the forward pass."""
    found: list[Meeting] = []
    waiting: list[tuple[Node, _Way]] = [(source, _Way(name))]
    while waiting:
        node, way = waiting.pop()
        above = parents.get(node, [])
        if not above:  # an output of the model, which the loss may use in any way
            return None
        for parent, operand in above:
            step = _beyond(way, parent, operand)
            if step is None:
                return None
            if isinstance(step, Meeting):
                found.append(step)
            else:
                waiting.append((parent, step))
    found.sort(key=lambda m: m.result[0]._sequence_nr())
    nodes = [meeting.node for meeting in found]
    return found if len(set(nodes)) == len(nodes) else None


@dataclass
class MeetingTap(TorchFunctionMode):
    """Shows the results in which sources meet the examples, while a model runs.

    Attributes:
        sources: Names of the tensors by their nodes; more may join while it runs.
        show: Called with the source's name and the result.
    """

    sources: dict[Node, str]
    show: Callable[[str, Tensor], object]
    _ways: dict[Node, list[_Way]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Initialize the mode."""
        super().__init__()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # as PyTorch declares it
        """Run the function, and look where its result comes from."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.grad_fn is not None:
            self._look(result, result.grad_fn)
        return result

    def _look(self, result: Tensor, node: Node) -> None:
        if node in self._ways:
            return  # a function that returns its argument
        found, met = [], False
        for way, operand in self._ways_into(node):
            step = _beyond(way, node, operand)
            if isinstance(step, Meeting):
                self.show(way.source, result)
                met = True
            elif step is not None:
                found.append(step)
        if found or met:
            self._ways[node] = found

    def _ways_into(self, node: Node) -> list[tuple[_Way, int]]:
        """Ways that lead to the operands of ``node``."""
        return [
            (way, operand)
            for operand, (child, _) in enumerate(node.next_functions)
            if child is not None
            for way in self._ways_through(child)
        ]

    def _ways_through(self, node: Node) -> list[_Way]:
        """Ways that lead beyond ``node``, which may be a step inside a function."""
        if node in self.sources:
            return [*self._ways.get(node, ()), _Way(self.sources[node])]
        if node in self._ways or node.name() not in _VIEWS | _REPEATS:
            return self._ways.get(node, [])
        steps = [_beyond(way, node, n) for way, n in self._ways_into(node)]
        return [step for step in steps if isinstance(step, _Way)]
