r"""What each example counts in a loss, read off the gradient of the model's outputs.

A cross-entropy of logits ``z``, whatever its weights, masks, ignored targets and means,
has the gradient ``c (softmax(z) - e_y)`` in every row: a target's count ``c`` follows
from any entry other than that of its class ``y``. Nothing depends on how, when or
through which function the loss was called.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHECK_EVERY = 16
"""Passes that are read between two looks at the counts, while these are all equal."""

_FIRST_CHECKS = 4
_LARGEST = 2**22
"""Entries of the largest outputs that are looked at: 32 MB in float64."""

_HELD = 2**15
"""Entries of the outputs that are looked at together: 256 KB in float64."""

_TOLERANCE = 1e-3
"""By how much counts may differ and still be called equal."""


@dataclass(frozen=True, slots=True)
class LossCounts:
    """What the examples of a pass count.

    Attributes:
        values: By example: the sum of its targets' counts ``(n,)``.
        total: Their sum; 1 for a mean, weighted or not, over the whole pass.
        equal: Whether they are the same for all examples.
    """

    values: Tensor
    total: float
    equal: bool

    @classmethod
    def of(cls, outputs: Tensor, grad: Tensor, axis: int) -> "LossCounts | None":
        """Return the counts; ``None`` if the loss is no cross-entropy of ``outputs``.

        Args:
            outputs: Of the model, classes on the last axis.
            grad: The gradient that arrives at them.
            axis: Of the examples.
        """
        if outputs.dim() < 2 or axis == outputs.dim() - 1 or outputs.shape[-1] < 2:
            return None
        logits, slopes = _by_example(outputs, axis), _by_example(grad.detach(), axis)
        step = max(1, _HELD // logits[0].numel())
        rows = [slice(i, i + step) for i in range(0, len(logits), step)]
        parts = [_counts_of_rows(logits[row], slopes[row]) for row in rows]
        counted, fitting = zip(*parts, strict=True)
        values, fits = torch.cat(counted), torch.stack(fitting)
        known, least, most, total = torch.stack(
            [fits.all().double(), values.amin(), values.amax(), values.sum()]
        ).tolist()
        if not known or least < 0 or total <= 0:
            return None
        return cls(values, total, most - least <= tolerance_of(outputs) * most)

    def is_of_mean(self, num_passes: int, *, by_size: bool) -> bool:
        """Whether the counts are those of a mean.

        Args:
            num_passes: What the loop may have divided it by.
            by_size: Whether it may have taken the pass's share of the examples instead.
        """
        if by_size and self.total < 1:
            return True
        factors = (1, num_passes)
        return any(abs(self.total * f - 1) <= _TOLERANCE for f in factors)

    def is_proportional(self, weights: Tensor) -> bool:
        """Whether ``weights`` are the same up to a factor."""
        shares = weights / weights.sum()
        difference = (shares - self.values / self.total).abs().amax()
        return bool(difference <= _TOLERANCE * shares.amax())


def _by_example(tensor: Tensor, axis: int) -> Tensor:
    """Examples, targets, classes: ``(n, T, V)``."""
    rows = tensor.movedim(axis, 0)
    return rows.reshape(len(rows), -1, rows.shape[-1])


def tolerance_of(outputs: Tensor) -> float:
    """By how much counts may differ and still be called equal."""
    return max(_TOLERANCE, 8 * torch.finfo(outputs.dtype).eps)


def _counts_of_rows(logits: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """What some examples count ``(b,)``, and whether their gradient is of this form.

    Args:
        logits: ``(b, T, V)``.
        slopes: The gradient that arrives at them, the same shape.
    """
    eps = torch.finfo(logits.dtype).eps
    slopes = slopes.double()
    shares = logits.double().softmax(-1)
    own = slopes.argmin(-1, keepdim=True)  # the class of the target: (b, T, 1)
    other = slopes.scatter(-1, own, -torch.inf).argmax(-1, keepdim=True)
    counts = slopes.gather(-1, other) / shares.gather(-1, other)  # (b, T, 1)
    expected = counts * shares.scatter_add_(-1, own, -torch.ones_like(counts))
    # p - 1 of a confident target has no digits left in the kernel's own dtype.
    size = slopes.abs().amax(-1)
    allowed = tolerance_of(logits) * size + 8 * eps * counts[..., 0].abs()
    fits = expected.sub_(slopes).abs().amax(-1) <= allowed
    return counts.sum((1, 2)), fits.all()


class CountSchedule:
    """When the counts are looked at: often at first, always once they are unequal."""

    def __init__(self) -> None:
        self._num_passes = 0
        self._unequal = False

    def is_due(self) -> bool:
        """Whether to look at the counts of the pass that has just ended."""
        self._num_passes += 1
        n = self._num_passes
        return self._unequal or n <= _FIRST_CHECKS or n % CHECK_EVERY == 0

    def checked(self, counts: LossCounts | None) -> None:
        """Note what was found."""
        self._unequal = self._unequal or (counts is not None and not counts.equal)

    @staticmethod
    def fits(outputs: Tensor) -> bool:
        """Whether the outputs of a model can be those that a loss is a function of."""
        return (
            outputs.is_floating_point()
            and not outputs.is_meta
            and outputs.layout is torch.strided
            and not outputs.is_nested
            and outputs.dim() > 1
            and 0 < outputs.numel() <= _LARGEST
        )
