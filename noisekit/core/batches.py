"""Batches: pairs of inputs and targets, in any nesting of tensors."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from noisekit.core.errors import UsageError

# What a user's loader yields is the user's own: only the model and the loss know.
Batch = tuple[Any, Any]


def as_batch(item: object) -> Batch:
    """Return ``item`` as ``(inputs, targets)``.

    Raises:
        UsageError: If it is not a pair.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    length = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
    way_out = (
        "a single batch is written [(inputs, targets)], several inputs as a tuple "
        "((a, b), targets) or a mapping."
    )
    if isinstance(item, Mapping):
        way_out = (
            "where the model takes the mapping and returns its loss, pass 'model' for "
            "loss_fn; else pass pairs such as [(b, b['labels']) for b in loader]."
        )
    elif not isinstance(item, tuple | list | Tensor):
        way_out = "pass pairs such as [(item, item.y) for item in loader]."
    raise UsageError(
        f"batches needs pairs (inputs, targets), got {type(item).__name__}{length}; "
        f"{way_out}"
    )


class ModelBatches:
    """Batches for a model that returns its own loss, each as a pair.

    A mapping with labels has those for targets, a tuple its last part. Everything is
    passed to the model.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        """Yield each batch with its targets beside it."""
        for item in self.loader:
            if isinstance(item, Mapping):
                named = [item[key] for key in ("labels", "label") if key in item]
                yield item, named[0] if named else None
            elif isinstance(item, tuple | list) and len(item) > 1:
                yield item, item[-1]
            else:
                yield item, None


def map_tensors(function: Any, value: Any) -> Any:  # any nesting a loader yields
    """Return ``value`` with ``function`` applied to each tensor inside.

    Objects with tensors as attributes, such as the graphs of PyTorch Geometric, are
    copied; others are passed on.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return _mapped_mapping(function, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    return _mapped_object(function, value)


def _mapped_object(function: Any, value: Any) -> Any:
    if callable(getattr(value, "apply", None)) and callable(getattr(value, "to", None)):
        return copy.copy(value).apply(function)
    attributes = getattr(value, "__dict__", None) or {}
    tensors = {k: v for k, v in attributes.items() if isinstance(v, Tensor)}
    if not tensors:
        return value
    mapped = copy.copy(value)
    for name, tensor in tensors.items():
        setattr(mapped, name, function(tensor))
    return mapped


def _mapped_mapping(function: Any, value: Mapping[Any, Any]) -> Any:
    items = {key: map_tensors(function, item) for key, item in value.items()}
    if type(value) is dict or not hasattr(value, "__setitem__"):
        return items
    mapped = copy.copy(value)  # its type may have attributes that a model reads
    for key, item in items.items():
        mapped[key] = item
    return mapped


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors inside ``value``, in order."""
    result: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        result.append(tensor)
        return tensor

    map_tensors(note, value)
    return result


def count_examples(batch: Batch) -> int:
    """Return the number of examples in ``batch``.

    The first axis of the targets counts them, unless the targets are a list with an
    entry per example, the flattened tokens of the inputs' examples, or have no axis.
    """
    inputs, targets = batch
    if _lists_examples(targets) or _lists_examples(inputs, targets):
        return len(targets if _lists_examples(targets) else inputs)
    first_inputs = next((t for t in tensors_in(inputs) if t.ndim), None)
    first_targets = next((t for t in tensors_in(targets) if t.ndim), None)
    if first_targets is None:
        return 0 if first_inputs is None else first_inputs.shape[0]
    count = first_targets.shape[0]
    if first_inputs is None or first_inputs.shape[0] in {0, count}:
        return count
    time_first = first_inputs.ndim > 1 and first_inputs.shape[1] == count
    if not time_first and count % first_inputs.shape[0] == 0:
        return first_inputs.shape[0]
    return count


def take_examples(batch: Batch, index: Tensor) -> Batch:
    """Return the examples of ``batch`` at ``index``, in that order."""
    count = count_examples(batch)

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        where = index.to(tensor.device)
        length = tensor.shape[0]
        if length == count:
            return tensor.index_select(0, where)
        if tensor.ndim > 1 and tensor.shape[1] == count:
            return tensor.index_select(1, where)
        if length % count == 0:  # flattened tokens: the same number per example
            grouped = tensor.reshape(count, -1, *tensor.shape[1:])
            return grouped.index_select(0, where).flatten(0, 1)
        return tensor

    def take_all(value: Any) -> Any:
        if _lists_examples(value, batch[1]) and len(value) == count:
            return [value[i] for i in index.tolist()]
        return map_tensors(take, value)

    return take_all(batch[0]), take_all(batch[1])


def join_examples(batches: Sequence[Batch]) -> Batch | None:
    """Return the examples of several batches as one; ``None`` where that is not clear.

    Every tensor needs an axis as long as its batch has examples, the first or the
    second, and the same lengths elsewhere.
    """
    counts = [count_examples(batch) for batch in batches]
    leaves = [tensors_in(batch) for batch in batches]
    if len({len(tensors) for tensors in leaves}) != 1:
        return None
    joined: list[Tensor] = []
    for tensors in zip(*leaves, strict=True):
        axis = _common_axis(tensors, counts)
        if axis is None:
            return None
        joined.append(torch.cat(tensors, axis))
    parts = iter(joined)
    if not joined:
        return None
    return (
        map_tensors(lambda _: next(parts), batches[0][0]),
        map_tensors(lambda _: next(parts), batches[0][1]),
    )


def _common_axis(tensors: Sequence[Tensor], counts: Sequence[int]) -> int | None:
    """The axis of the examples, where all tensors agree in it and beside it."""
    for axis in (0, 1):
        if all(
            t.ndim > axis and t.shape[axis] == n
            for t, n in zip(tensors, counts, strict=True)
        ):
            rest = {(*t.shape[:axis], *t.shape[axis + 1 :]) for t in tensors}
            return axis if len(rest) == 1 else None
    return None


def _lists_examples(value: object, targets: object = None) -> bool:
    """Whether ``value`` is a list with one entry per example, as in detection."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(item, Mapping) for item in value):
        return True
    # Several inputs that a loader has collated into a list are batches themselves.
    return (
        isinstance(targets, Tensor)
        and targets.ndim > 0
        and len(targets) == len(value)
        and all(
            isinstance(t, Tensor) and t.shape[:1] != targets.shape[:1] for t in value
        )
    )
