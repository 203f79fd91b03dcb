"""Which axis of a tensor runs over the examples of the batch."""

from collections.abc import Sequence

from torch import Tensor

from noisekit.core.errors import BatchSizeError

WHOLE = -1
"""The tensor belongs to one example as a whole: the batch has one example."""

MIXED = -2
"""The tensor depends on the examples, but its entries are not theirs in their order."""


def axis_of_examples(
    shape: Sequence[int],
    num_examples: int,
    *,
    among: Sequence[int],
    where: str,
    known: int | None = None,
) -> int | None:
    """Return the axis that runs over the examples, or ``None`` where none does.

    Args:
        shape: Shape of the tensor.
        num_examples: Examples of the batch.
        among: Axes that may be it, such as all but the features.
        where: What the tensor is, for the error.
        known: Axis found earlier at the same place, which settles doubt.

    Raises:
        BatchSizeError: If several axes have as many entries as the batch examples.
    """
    if num_examples == 1 and len(among) != 1:
        return WHOLE
    fitting = [axis for axis in among if shape[axis] == num_examples]
    if len(fitting) <= 1:
        return fitting[0] if fitting else None
    if known in fitting:
        return known
    raise BatchSizeError(
        f"per-example gradients need one axis of {num_examples} examples, got "
        f"{len(fitting)} axes of that length {tuple(fitting)} in shape {tuple(shape)} "
        f"at {where}; use another batch size for the first reading, so that examples "
        "and positions can be distinguished."
    )


def examples_first(tensor: Tensor, axis: int) -> Tensor:
    """Return a view with the examples on axis 0."""
    if axis == WHOLE:
        return tensor.unsqueeze(0)
    return tensor if axis == 0 else tensor.movedim(axis, 0)


def example_rows(tensor: Tensor, axis: int, rows: slice) -> Tensor:
    """Return the examples ``rows`` only, with the axis where it was."""
    if axis == WHOLE:
        return tensor
    return tensor.narrow(axis, rows.start, rows.stop - rows.start)
