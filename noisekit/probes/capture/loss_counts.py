r"""What each example counts in a loss, read off the gradient of the model's outputs.

A cross-entropy of logits ``z``, whatever its weights, masks, ignored targets and means,
has the gradient ``c (softmax(z) - e_y)`` in every row: a target's count ``c`` follows
from any entry other than that of its class ``y``. Nothing depends on how, when or
through which function the loss was called. Three further losses have a gradient as
telling: cross-entropy with smoothed labels, ``c (softmax(z) - q)``; the negative
log-likelihood of outputs that are log-probabilities, ``-c e_y``; and the binary
cross-entropy of several logits, ``c (sigmoid(z) - y)`` in every entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
        """Return the counts; ``None`` if the gradient is of none of these forms.

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
        form = _form_of(logits[rows[0]], slopes[rows[0]])
        if form is None:
            return None
        parts = [form(logits[row], slopes[row]) for row in rows]
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

    def is_multiple(self, factor: float, num_passes: int) -> bool:
        """Whether the loss is ``factor`` times a mean, divided by the passes or not."""
        ratios = (self.total / factor, self.total * num_passes / factor)
        return any(abs(ratio - 1) <= _TOLERANCE for ratio in ratios)

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


_Form = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of outputs and their gradient ``(b, T, V)``: counts ``(b,)``, whether all fit."""


def _form_of(outputs: Tensor, slopes: Tensor) -> _Form | None:
    """The form of the gradient that the first examples have."""
    forms: tuple[_Form, ...] = (
        _of_cross_entropy,
        _of_log_likelihood,
        partial(_of_smoothed, smoothing=_smoothing(outputs, slopes)),
        _of_binary,
    )
    return next((form for form in forms if bool(form(outputs, slopes)[1])), None)


def _of_log_likelihood(outputs: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """``-c e_y`` in every row, of outputs that are log-probabilities."""
    slopes, least = slopes.double(), slopes.double().amin(-1)
    one_entry = (slopes != 0).sum(-1) <= 1
    normalised = outputs.double().logsumexp(-1).abs() <= tolerance_of(outputs)
    return -least.sum(1), (one_entry & normalised).all()


def _smoothing(logits: Tensor, slopes: Tensor) -> float:
    """Weight of a class that is not the target's, from the best-conditioned row.

    Of these classes ``s_j = c (p_j - e)``: ``e`` is the mean of ``p`` less that of
    ``s`` over the slope ``c`` of ``s`` against ``p``.
    """
    if logits.shape[-1] < 3:
        return 0.0
    shares, slopes = logits.double().softmax(-1), slopes.double()
    others = torch.ones_like(slopes).scatter_(-1, slopes.argmin(-1, keepdim=True), 0.0)
    count = others.shape[-1] - 1
    mean_p = (others * shares).sum(-1, keepdim=True) / count  # (b, T, 1)
    mean_s = (others * slopes).sum(-1, keepdim=True) / count
    spread = others * (shares - mean_p)
    moment = (spread * slopes).sum(-1)
    best = moment.flatten().argmax()
    steep = moment.flatten()[best] / spread.square().sum(-1).flatten()[best]
    return float(mean_p.flatten()[best] - mean_s.flatten()[best] / steep)


def _of_smoothed(
    logits: Tensor, slopes: Tensor, *, smoothing: float
) -> tuple[Tensor, Tensor]:
    """``c (softmax(z) - q)``, with ``smoothing`` of ``q`` on every other class."""
    num_classes = logits.shape[-1]
    if not 0.0 < smoothing * num_classes <= 1.0:  # NaN too
        return slopes.sum((1, 2)), torch.zeros((), dtype=torch.bool)
    slopes = slopes.double()
    shares = torch.full_like(slopes, smoothing)
    shares.scatter_(
        -1, slopes.argmin(-1, keepdim=True), 1 - (num_classes - 1) * smoothing
    )
    ahead = logits.double().softmax(-1) - shares
    # Least squares over the row; one without any gradient is ignored and counts 0.
    squares = ahead.square().sum(-1)
    counts = (slopes * ahead).sum(-1) / squares.where(squares > 0, 1.0)
    size = slopes.abs().amax(-1)
    wrong = (counts[..., None] * ahead - slopes).abs().amax(-1)
    return counts.sum(1), (wrong <= tolerance_of(logits) * size).all()


def _of_binary(logits: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """``c (sigmoid(z) - y)`` with one ``c`` for all entries of an example.

    The sign of an entry says whether ``y`` is 0 or 1. With a single entry for each
    example any gradient would fit.
    """
    slopes = slopes.double().flatten(1)  # (b, T V)
    shares = logits.double().flatten(1).sigmoid()
    counts = slopes / torch.where(slopes > 0, shares, shares - 1)
    most, least = counts.amax(1), counts.amin(1)
    alike = most - least <= tolerance_of(logits) * most
    several = torch.full((), slopes.shape[1] > 1)
    return counts.sum(1), alike.all() & several


def _of_cross_entropy(logits: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
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
