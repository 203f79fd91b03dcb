"""The loss along a line, or a quarter of an ellipse, through two solutions."""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import NumPoints
from noisekit.sharpness.landscape.points import (
    loss_range,
    own_state,
    values_at,
    wide,
)

if TYPE_CHECKING:
    import pandas as pd

Path = Literal["linear", "curvilinear"]

_SAME_POINT = 1e-9
"""Grid points closer to 0 or 1 than this become 0 or 1."""


@dataclass(frozen=True, slots=True)
class Valley:
    """The part of the line around one solution where the loss stays low.

    Attributes:
        left: Where it begins, in units of the line's coordinate alpha.
        right: Where it ends.
        bounded: Whether both ends lie within the line that was evaluated; if not,
            the valley is at least this wide.
    """

    left: float
    right: float
    bounded: bool

    @property
    def half_width(self) -> float:
        """Half of the valley's width, in units of alpha."""
        return (self.right - self.left) / 2


@dataclass(frozen=True, slots=True)
class Interpolation:
    """Loss and error at points of a path from ``start`` to ``end``.

    Attributes:
        alphas: Coordinates along the line, increasing; 0 and 1 are always there.
        losses: Loss at each; may be infinite or NaN far outside.
        errors: Share of misclassified examples at each, NaN where the data have no
            classes.
        bn: What BatchNorm normalised with. Under ``"running"`` the running statistics
            are interpolated like the weights.
        num_examples: Examples behind each loss.
        path: ``"linear"``, ``"curvilinear"``, or the shape of a trained curve.
        kept: Buffers that are those of ``start`` all along, though ``end`` has others:
            counters, masks and whatever else is no finite number.
        num_batched: Points that were evaluated many at a time.
        loop_reason: Why the others, both ends apart, went one by one; else empty.
    """

    alphas: tuple[float, ...] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    errors: tuple[float, ...] = field(repr=False)
    bn: BatchNormPolicy
    num_examples: int
    path: Path | Literal["bezier", "polychain"] = "linear"
    num_batched: int = 0
    loop_reason: str = ""
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Write the path, both ends' losses, the barrier, and the losses' range."""
        return (
            f"{self.path} path of {len(self.alphas)} points: {self._loss_at(0):.4g} at "
            f"the start, {self._loss_at(1):.4g} at the end, barrier "
            f"{self.barrier:.4g}; {loss_range(self.losses)}; BatchNorm {self.bn}"
            + (f"; {', '.join(self.kept)} as at the start" if self.kept else "")
        )

    def frame(self) -> "pd.DataFrame":
        """Return a table with the columns ``alpha``, ``loss`` and ``error``."""
        import pandas as pd

        columns = {"alpha": self.alphas, "loss": self.losses, "error": self.errors}
        return pd.DataFrame(columns)

    @property
    def barrier(self) -> float:
        r"""Height of the loss above the straight line between both ends [loss].

        .. math:: \max_{0 \le \alpha \le 1} L(\alpha) - (1 - \alpha) L(0) - \alpha L(1)

        It is 0 where the loss lies below that line, and at least what the grid shows.

        Source:
            Frankle et al. 2020, arXiv:1912.05671, section 2.
        """
        alphas, losses = np.array(self.alphas), np.array(self.losses)
        between = (alphas >= 0) & (alphas <= 1)
        chord = (1 - alphas) * self._loss_at(0) + alphas * self._loss_at(1)
        return float(np.max((losses - chord)[between]))

    def valley(self, at: int, *, rise: float = 1.0) -> Valley:
        """Return how far the loss stays below that of one solution plus ``rise``.

        The ends are interpolated linearly between grid points.

        Args:
            at: 0 for the valley of ``start``, 1 for that of ``end``.
            rise: Height of the level above the solution's own loss [loss].

        Raises:
            UsageError: If ``at`` is not 0 or 1, or ``rise`` is not positive.
        """
        if at not in {0, 1}:
            raise UsageError(f"at needs to be 0 (start) or 1 (end), got {at}.")
        if not rise > 0:
            raise UsageError(f"rise needs to be positive, got {rise}.")
        level = self._loss_at(at) + rise
        middle = self.alphas.index(at)
        left, left_found = self._crossing(middle, -1, level)
        right, right_found = self._crossing(middle, 1, level)
        return Valley(left, right, bounded=left_found and right_found)

    def _loss_at(self, alpha: int) -> float:
        return self.losses[self.alphas.index(alpha)]

    def _crossing(
        self, middle: int, direction: int, level: float
    ) -> tuple[float, bool]:
        """Where the loss first reaches ``level`` from ``middle`` on, if it does.

        If not, where the line or what is known of the loss ends, and ``False``.
        """
        last = len(self.alphas) - 1 if direction > 0 else 0
        for inside in range(middle, last, direction):
            outside = inside + direction
            if math.isnan(self.losses[outside]):
                return self.alphas[inside], False
            if not self.losses[outside] < level:
                step = self.losses[outside] - self.losses[inside]
                share = (level - self.losses[inside]) / step
                share = share if math.isfinite(step) else 0.0
                width = self.alphas[outside] - self.alphas[inside]
                return self.alphas[inside] + share * width, True
        return self.alphas[last], False


@checked
def interpolate(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    num_points: NumPoints = 25,
    span: tuple[float, float] = (-1.0, 2.0),
    path: Path = "linear",
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
) -> Interpolation:
    r"""Return loss and error along a path from one state dict through another.

    .. math:: (1 - \alpha)\, w_0 + \alpha\, w_1 \quad\text{(linear)}, \qquad
              \cos(\alpha \pi / 2)\, w_0 + \sin(\alpha \pi / 2)\, w_1
              \quad\text{(curvilinear)}

    Everything of floating type is interpolated, also BatchNorm's running statistics,
    which go straight on either path since a variance has no angle; counters are those
    of ``start``. Interpolated statistics are not those of the interpolated weights,
    and outside of both ends a variance may become negative and the loss NaN:
    ``bn="recalibrated"`` recomputes them at each point. Points between are
    evaluated many at a time where PyTorch can.

    Arguments that are not listed are those of
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        model: A model that both state dicts fit, or an :class:`EmpiricalRisk` of it,
            all of whose weights move; it is restored bit for bit.
        start: State dict at ``alpha = 0`` (the paper's small batch).
        end: State dict at ``alpha = 1`` (the paper's large batch).
        num_points: Points of the even grid; 0 and 1 are added where it misses them.
        span: Where the line begins, at most 0, and where it ends, at least 1.
        path: The straight line, or the curve that keeps the length of the weights
            where both ends are orthogonal and of equal length.

    Returns:
        The losses and errors, and the width of the valley around each end.

    Raises:
        UsageError: If a state dict does not fit the model, the line does not contain
            both ends, or ``path`` is neither.

    Source:
        Keskar et al. 2017, arXiv:1609.04836, figures 3 and 7; after Goodfellow et al.
        2015, arXiv:1412.6544.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> ends = {
        ...     "start": {"weight": torch.tensor([[-1.0, 0.0]])},
        ...     "end": {"weight": torch.tensor([[1.0, 0.0]])},
        ... }
        >>> path = nk.interpolate(model, loss_fn, batches, **ends, num_points=5)
        >>> [round(alpha, 2) for alpha in path.alphas]
        [-1.0, -0.25, 0.0, 0.5, 1.0, 1.25, 2.0]
        >>> [round(loss, 3) for loss in path.losses]
        [4.5, 1.125, 0.5, 0.0, 0.5, 1.125, 4.5]
    """
    alphas = _grid(num_points, *span)
    if path not in get_args(Path):
        raise UsageError(f"path needs to be 'linear' or 'curvilinear', got {path!r}.")
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser)
    own = own_state(risk.model)
    start, end = fitting_state(own, start, "start"), fitting_state(own, end, "end")
    buffers = {name for name, _ in risk.model.named_buffers(remove_duplicate=False)}
    kept = tuple(key for key in own if key in buffers and _differs(start, end, key))
    end |= {key: start[key] for key in kept}

    def state_at(index: int) -> dict[str, Tensor]:
        return _between(start, end, alphas[index], path=path, statistics=buffers)

    values = values_at(
        risk,
        state_at,
        len(alphas),
        exact=[alphas.index(0.0), alphas.index(1.0)],
    )
    return Interpolation(
        tuple(alphas),
        values.losses,
        values.errors,
        risk.bn,
        risk.num_examples,
        path=path,
        num_batched=values.num_batched,
        loop_reason=values.loop_reason,
        kept=kept,
    )


def _grid(num_points: int, low: float, high: float) -> list[float]:
    """Even points from ``low`` to ``high``, with 0 and 1 among them exactly."""
    if num_points < 2:
        raise UsageError(f"num_points needs to be at least 2, got {num_points}.")
    if not (-math.inf < low <= 0 and 1 <= high < math.inf):
        raise UsageError(
            "span needs to contain both ends, (low, high) with low <= 0 and high >= 1, "
            f"got ({low}, {high})."
        )
    even = np.linspace(low, high, num_points).tolist()
    apart = [a for a in even if min(abs(a), abs(a - 1)) > _SAME_POINT]
    return sorted([*apart, 0.0, 1.0])


def fitting_state(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Return a copy of a state dict that fits: it may be the model's own, and move.

    Raises:
        UsageError: If a tensor is missing, unknown or of another shape.
    """
    given = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    faults = [f"no {key}" for key in own if key not in given]
    faults += [f"{key}, which the model has not" for key in given if key not in own]
    faults += [
        f"{key} of shape {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UsageError(
            f"{name} needs to be a state dict of this model, got "
            f"{'; '.join(faults[:5])}{more}; pass the state_dict() of a model of the "
            "same class and size."
        )
    return {key: given[key].detach().clone() for key in own}


def _between(
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    alpha: float,
    *,
    path: Path,
    statistics: Container[str],
) -> dict[str, Tensor]:
    """Return the state at ``alpha``; exactly one of the ends at 0 and 1."""
    if alpha == 0:
        return dict(start)
    if alpha == 1:
        return dict(end)
    state = {}
    for key, value in start.items():
        straight = path == "linear" or key in statistics
        first, second = _coefficients("linear" if straight else path, alpha)
        if key in statistics and torch.equal(value, end[key]):
            state[key] = value  # also where that is infinite
        else:
            moved = first * _double(value) + second * _double(end[key])
            state[key] = moved.to(wide(value).dtype)
    return state


def _differs(start: Mapping[str, Tensor], end: Mapping[str, Tensor], key: str) -> bool:
    """Whether a buffer has other values at the end, and none between them."""
    both = start[key], end[key]
    numbers = both[0].is_floating_point() or both[0].is_complex()
    finite = numbers and all(bool(tensor.isfinite().all()) for tensor in both)
    return not finite and not torch.equal(*both)


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.cdouble if tensor.is_complex() else torch.double)


def _coefficients(path: Path, alpha: float) -> tuple[float, float]:
    """What both ends are multiplied by."""
    if path == "linear":
        return 1 - alpha, alpha
    return math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)
