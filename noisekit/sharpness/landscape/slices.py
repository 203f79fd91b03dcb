"""The loss on a line or a plane through the present weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import NumPoints, Positive
from noisekit.sharpness.landscape.directions import (
    DirectionKind,
    Directions,
    DirectionSpec,
    directions_for,
)
from noisekit.sharpness.landscape.points import (
    chosen_names,
    loss_range,
    own_state,
    values_at,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False)
class LossSlice:
    """Loss and error on a grid around the weights.

    Attributes:
        coordinates: One increasing array per axis; 0 is always in it.
        losses: Loss at each grid point, of shape ``(n,)`` or ``(n, n)`` with the first
            direction along the first axis; may be infinite or NaN.
        errors: Share of misclassified examples, NaN where the data have no classes.
        directions: The axes: their vectors, what a step of 1 means, their angle.
        bn: What BatchNorm normalised with. Under ``"running"`` the statistics are
            those of the weights in the middle, on the whole grid.
        num_examples: Examples behind each loss.
        num_batched: Points that were evaluated many at a time.
        loop_reason: Why the others, the middle apart, went one by one; else empty.
    """

    coordinates: tuple[np.ndarray, ...] = field(repr=False)
    losses: np.ndarray = field(repr=False)
    errors: np.ndarray = field(repr=False)
    directions: Directions
    bn: BatchNormPolicy
    num_examples: int
    num_batched: int
    loop_reason: str

    @property
    def middle_loss(self) -> float:
        """Loss at the weights themselves [loss]."""
        middle = tuple(int(np.flatnonzero(c == 0)[0]) for c in self.coordinates)
        return float(self.losses[middle])

    def __str__(self) -> str:
        """Write the grid, the range of the losses, and the directions."""
        grid = " x ".join(str(len(axis)) for axis in self.coordinates)
        return (
            f"loss slice of {grid} points: {self.middle_loss:.4g} in the middle, "
            f"{loss_range(self.losses)}; BatchNorm {self.bn}\n  {self.directions}"
        )

    def frame(self) -> "pd.DataFrame":
        """Return a table with ``first``, in a plane ``second``, ``loss``, ``error``."""
        import pandas as pd

        grids = np.meshgrid(*self.coordinates, indexing="ij")
        names = ("first", "second")[: len(grids)]
        columns = {name: g.ravel() for name, g in zip(names, grids, strict=True)}
        values = {"loss": self.losses.ravel(), "error": self.errors.ravel()}
        return pd.DataFrame(columns | values)


@checked
def loss_slice(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    directions: DirectionKind
    | DirectionSpec
    | Directions
    | Sequence[Tensor] = "filter_normalised",
    dims: Annotated[int, Ge(1), Le(2)] | None = None,
    extent: Positive = 1.0,
    num_points: NumPoints = 25,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> LossSlice:
    r"""Return the loss on a line or a plane through the model's weights.

    .. math:: F(w + a\, d_1 + b\, d_2), \qquad |a|, |b| \le \text{extent}

    A slice shows two of ``P`` directions, and its apparent width depends on the scale
    of the weights. Filter normalization removes the scale of each filter, which makes
    slices of a ReLU network comparable under rescalings of whole layers, not of single
    neurons. Grid points are evaluated in batches with ``vmap`` where PyTorch can,
    within the risk's memory budget.

    Arguments that are not listed are those of
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        model: The model, or an :class:`EmpiricalRisk` in place of it, of ``loss_fn``
            and of ``batches``; only the chosen parameters move.
        directions: ``"filter_normalised"``, ``"random"`` or ``"eigenvectors"``, or a
            :class:`DirectionSpec` that states the generator as well; or one flat
            vector ``(P,)`` per axis, or another slice's directions, taken as they are.
        dims: 1 for a line, 2 for a plane; 2 by default, or the number of vectors.
        extent: The grid goes from ``-extent`` to ``extent`` along each direction.
        num_points: Points of the even grid along each axis; 0 is added where the grid
            misses it.
        bn: What BatchNorm normalises with; ``"recalibrated"`` recomputes the statistics
            at each point.

    Returns:
        The losses and errors on the grid, and the directions.

    Raises:
        UsageError: If an argument is out of range.

    Source:
        Li et al. 2018, arXiv:1712.09913, section 4.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> surface = nk.loss_slice(model, loss_fn, batches, num_points=5)
        >>> surface.losses.shape, float(surface.losses[2, 2])
        ((5, 5), 2.5)
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    risk = risk.in_precision(torch.float32)
    directions = directions_for(risk, directions, dims)
    axis = _grid(extent, num_points)
    dims = directions.vectors.shape[1]
    shape = (len(axis),) * dims
    middle = int(np.flatnonzero(axis == 0)[0])
    names, own = chosen_names(risk), own_state(risk.model)
    present = {key: own[key].clone() for key in names}
    weights, columns = risk.vector().double(), directions.vectors.double()

    def state_at(index: int) -> dict[str, Tensor]:
        steps = [float(axis[i]) for i in np.unravel_index(index, shape)]
        if not any(steps):
            return present
        # Added in double precision and rounded once: w + a d of a small step would
        # otherwise lose the digits of d.
        moved = (weights + columns @ columns.new_tensor(steps)).to(risk.layout.dtype)
        parts = dict(zip(risk.layout.names, risk.layout.split(moved), strict=True))
        return {key: parts[first] for key, first in names.items()}

    values = values_at(
        risk,
        state_at,
        len(axis) ** dims,
        exact=[int(np.ravel_multi_index((middle,) * dims, shape))],
    )
    return LossSlice(
        coordinates=(axis,) * dims,
        losses=np.array(values.losses).reshape(shape),
        errors=np.array(values.errors).reshape(shape),
        directions=directions,
        bn=risk.bn,
        num_examples=risk.num_examples,
        num_batched=values.num_batched,
        loop_reason=values.loop_reason,
    )


def _grid(extent: float, num_points: int) -> np.ndarray:
    """Even points from ``-extent`` to ``extent``, with exactly 0 among them."""
    even = np.linspace(-extent, extent, num_points)
    # linspace rounds the middle of an odd grid to 1e-17 instead of 0.
    nonzero = even[np.abs(even) > 1e-9 * extent]
    return np.sort(np.append(nonzero, 0.0))
