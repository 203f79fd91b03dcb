"""The loss along the straight line through two solutions."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.risk import (
    Batch,
    BatchNormPolicy,
    EmpiricalRisk,
    LossFn,
    Normaliser,
)

if TYPE_CHECKING:
    import pandas as pd

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
    """Loss and error at ``(1 - alpha) start + alpha end``.

    Attributes:
        alphas: Coordinates along the line, increasing; 0 and 1 are always there.
        losses: Loss at each; may be infinite or NaN far outside.
        errors: Share of misclassified examples at each, NaN where the data have no
            classes.
        bn: What BatchNorm normalised with. Under ``"running"`` the running statistics
            are interpolated like the weights.
        num_examples: Examples behind each loss.
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    bn: BatchNormPolicy
    num_examples: int

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
        left = self._crossing(middle, -1, level)
        right = self._crossing(middle, 1, level)
        return Valley(
            left=self.alphas[0] if left is None else left,
            right=self.alphas[-1] if right is None else right,
            bounded=left is not None and right is not None,
        )

    def _loss_at(self, alpha: int) -> float:
        return self.losses[self.alphas.index(alpha)]

    def _crossing(self, middle: int, direction: int, level: float) -> float | None:
        """Where the loss first reaches ``level`` from ``middle`` on."""
        last = len(self.alphas) - 1 if direction > 0 else 0
        for inside in range(middle, last, direction):
            outside = inside + direction
            if not self.losses[outside] < level:
                step = self.losses[outside] - self.losses[inside]
                share = (level - self.losses[inside]) / step
                share = share if math.isfinite(step) else 0.0
                width = self.alphas[outside] - self.alphas[inside]
                return self.alphas[inside] + share * width
        return None


def interpolate(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    num_points: int = 25,
    low: float = -1.0,
    high: float = 2.0,
    bn: BatchNormPolicy = "running",
    normaliser: Normaliser | None = None,
) -> Interpolation:
    """Return loss and error along the line from one state dict through another.

    Everything of floating type is interpolated, also BatchNorm's running statistics;
    counters are those of ``start``. Interpolated statistics are not those of the
    interpolated weights, and outside of both ends a variance may become negative and
    the loss NaN: ``bn="recalibrated"`` computes them anew at each point.

    Args:
        model: A model that both state dicts fit; it is given back bit for bit.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar.
        batches: Pairs ``(inputs, targets)``; the loss is that over all of them.
        start: State dict at ``alpha = 0`` (the paper's small batch).
        end: State dict at ``alpha = 1`` (the paper's large batch).
        num_points: Points of the even grid; 0 and 1 are added where it misses them.
        low: Where the line begins, at most 0.
        high: Where it ends, at least 1.
        bn: What BatchNorm normalises with.
        normaliser: What ``loss_fn`` divides by, where it is not the example count.

    Returns:
        The losses and errors, and the width of the valley around each end.

    Raises:
        UsageError: If a state dict does not fit the model, or the line does not
            contain both ends.

    Source:
        Keskar et al. 2017, arXiv:1609.04836, figure 3; after Goodfellow et al. 2015,
        arXiv:1412.6544.
    """
    risk = EmpiricalRisk(model, loss_fn, batches, bn=bn, normaliser=normaliser)
    return interpolate_of(
        risk, start=start, end=end, num_points=num_points, low=low, high=high
    )


def interpolate_of(
    risk: EmpiricalRisk,
    *,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    num_points: int = 25,
    low: float = -1.0,
    high: float = 2.0,
) -> Interpolation:
    """Return a risk's loss and error along a line; see :func:`interpolate`.

    All weights move, whatever parameters the risk selects.

    Raises:
        UsageError: If a state dict does not fit the model, or the line does not
            contain both ends.
    """
    alphas = _grid(num_points, low, high)
    state = risk.model.state_dict()
    own = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    start, end = _copied(own, start, "start"), _copied(own, end, "end")
    losses, errors = [], []
    with _state_given_back(own):
        for alpha in alphas:
            _load_between(own, start, end, alpha)
            point = risk.evaluate()
            losses.append(point.loss)
            errors.append(math.nan if point.error is None else point.error)
    return Interpolation(
        tuple(alphas), tuple(losses), tuple(errors), risk.bn, risk.num_examples
    )


def _grid(num_points: int, low: float, high: float) -> list[float]:
    """Even points from ``low`` to ``high``, with 0 and 1 among them exactly."""
    if num_points < 2:
        raise UsageError(f"num_points needs to be at least 2, got {num_points}.")
    if not (-math.inf < low <= 0 and 1 <= high < math.inf):
        raise UsageError(
            "the line needs to contain both ends, low <= 0 and high >= 1, got "
            f"low={low} and high={high}."
        )
    even = np.linspace(low, high, num_points).tolist()
    apart = [a for a in even if min(abs(a), abs(a - 1)) > _SAME_POINT]
    return sorted([*apart, 0.0, 1.0])


def _copied(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """A copy of a state dict that fits: it may be the model's own, and move along."""
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


@contextmanager
def _state_given_back(own: Mapping[str, Tensor]) -> Iterator[None]:
    """Write parameters and buffers back on exit, bit for bit."""
    copies = {key: value.clone() for key, value in own.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(copies[key])


@torch.no_grad()
def _load_between(
    own: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    alpha: float,
) -> None:
    """Load ``(1 - alpha) start + alpha end``; exactly one of them at 0 and 1."""
    for key, value in own.items():
        if alpha == 0 or not value.is_floating_point():
            value.copy_(start[key])
        elif alpha == 1:
            value.copy_(end[key])
        else:
            first = start[key].to(value.device, torch.float64)
            second = end[key].to(value.device, torch.float64)
            value.copy_((1 - alpha) * first + alpha * second)
