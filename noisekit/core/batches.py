"""What a loader yields: pairs of inputs and targets, in any nesting of tensors."""

from collections.abc import Mapping
from typing import Any

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
    raise UsageError(
        f"batches needs pairs (inputs, targets), got {type(item).__name__}{length}; "
        "a single batch is written [(inputs, targets)], several inputs as a tuple "
        "((a, b), targets) or a mapping."
    )


def map_tensors(function: Any, value: Any) -> Any:  # any nesting a loader yields
    """Return ``value`` with ``function`` applied to each tensor inside."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors inside ``value``, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor), value)
    return found


def count_examples(batch: Batch) -> int:
    """Return the number of examples in ``batch``.

    The first axis of the targets counts them, unless the targets are the flattened
    tokens of the inputs' examples, or have no axis.
    """
    inputs, targets = batch
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

    return map_tensors(take, batch[0]), map_tensors(take, batch[1])
