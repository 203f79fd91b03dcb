"""A curve of low loss between two solutions, found by training its bend."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import flatten
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import Count, Positive, check_settings
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.landscape.interpolation import (
    Interpolation,
    fitting_state,
    interpolate,
)
from noisekit.sharpness.landscape.points import (
    chosen_names,
    load_state,
    own_state,
    preserve_tensors,
    values_at,
    wide,
)

CurveShape = Literal["bezier", "polychain"]

_FIRST_NUDGE = 1e-2
"""Of the ends' distance: a straight line over a ridge has no slope to either side."""


@dataclass(frozen=True, slots=True, eq=False)
class ConnectingCurve:
    """A curve between two solutions, beside the straight line.

    Attributes:
        curve: Losses and errors along it; ``alphas`` are its coordinate from 0 to 1.
        straight: The same along the straight line, on the same points.
        shape: ``"bezier"`` or ``"polychain"``.
        bend: State dict of the curve's middle control point.
        num_grads: Gradient evaluations over all data that the training took.
    """

    curve: Interpolation
    straight: Interpolation
    shape: CurveShape
    bend: Mapping[str, Tensor] = field(repr=False)
    num_grads: int

    @property
    def barrier(self) -> float:
        """Height of the curve above the line between both ends' losses [loss]."""
        return self.curve.barrier

    def __str__(self) -> str:
        """Write the curve, with the barrier of the straight line beside it."""
        return (
            f"{self.curve}\n  straight line: barrier {self.straight.barrier:.4g}; "
            f"{self.num_grads} gradients"
        )


@dataclass(frozen=True, slots=True)
class CurveTraining:
    """How the bend of a curve is trained.

    Attributes:
        num_steps: Steps of Adam, one gradient over all data each; 0 leaves the bend in
            the middle of the straight line.
        learning_rate: Adam's, in units of the root mean square distance of the ends
            per weight.
        generator: Source of the points that are trained on; by default a fresh one.
    """

    num_steps: Count = 200
    learning_rate: Positive = 0.05
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Refuse what trains nothing.

        Raises:
            UsageError: If steps or rate are out of range.
        """
        check_settings(self)


_DEFAULT_TRAINING = CurveTraining()


@checked
def connecting_curve(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    shape: CurveShape = "bezier",
    num_points: Annotated[int, Ge(3), Le(10**6)] = 21,
    training: CurveTraining = _DEFAULT_TRAINING,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
) -> ConnectingCurve:
    r"""Return a curve between two solutions along which the loss stays low.

    .. math:: (1 - t)^2 w_0 + 2 t (1 - t)\, \theta + t^2 w_1 \quad\text{(bezier)}

    A ``"polychain"`` goes straight from :math:`w_0` to :math:`\theta` and on to
    :math:`w_1`. The bend :math:`\theta` starts in the middle and is trained by Adam on
    the loss over all data at a random point of the curve. A low curve shows that two
    minima lie in one valley; a high one only that this search found none.

    Arguments that are not listed are those of
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        model: A model that both state dicts fit, or an :class:`EmpiricalRisk` of it;
            it is restored bit for bit.
        start: State dict at ``t = 0``.
        end: State dict at ``t = 1``.
        shape: ``"bezier"`` or ``"polychain"``.
        num_points: Points at which the curve is evaluated, ends included.
        training: How the bend is trained: steps, rate and generator.
        bn: What BatchNorm normalises with; ``"recalibrated"`` by default.
            ``"running"`` moves the statistics along the straight line, and they are
            then not those of the curve's weights.

    Raises:
        UsageError: If a state dict does not fit the model, or an argument is out of
            range.

    Source:
        Garipov et al. 2018, arXiv:1802.10026, section 3.
    """
    if bn is None and not isinstance(model, EmpiricalRisk):
        bn = "recalibrated"
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser)
    risk = risk.in_precision(torch.float32)
    own = own_state(risk.model)
    path = _Path(
        risk,
        shape,
        fitting_state(own, start, "start"),
        fitting_state(own, end, "end"),
    )
    if training.num_steps:
        with risk.model_converted():
            _train(path, own_state(risk.model), training)
    times = [float(t) for t in np.linspace(0, 1, num_points)]
    values = values_at(
        risk, lambda i: path.state_at(times[i]), num_points, exact=[0, num_points - 1]
    )
    return ConnectingCurve(
        curve=Interpolation(
            tuple(times),
            values.losses,
            values.errors,
            risk.bn,
            risk.num_examples,
            path=shape,
            num_batched=values.num_batched,
            loop_reason=values.loop_reason,
        ),
        straight=interpolate(
            risk, start=start, end=end, num_points=num_points, span=(0.0, 1.0)
        ),
        shape=shape,
        bend=path.bend_state(),
        num_grads=training.num_steps,
    )


class _Path:
    """The curve for one bend."""

    def __init__(
        self,
        risk: EmpiricalRisk,
        shape: CurveShape,
        start: dict[str, Tensor],
        end: dict[str, Tensor],
    ) -> None:
        self.risk = risk
        self._shape = shape
        self._start, self._end = start, end
        self._names = chosen_names(risk)
        self.first, self.last = (
            flatten(state[name] for name in risk.layout.names).double()
            for state in (start, end)
        )
        self.bend = (self.first + self.last) / 2

    def shares(self, t: float) -> tuple[float, float, float]:
        """What start, bend and end are multiplied by."""
        if self._shape == "bezier":
            return (1 - t) ** 2, 2 * t * (1 - t), t**2
        if t <= 0.5:
            return 1 - 2 * t, 2 * t, 0.0
        return 0.0, 2 - 2 * t, 2 * t - 1

    def state_at(self, t: float) -> dict[str, Tensor]:
        """Weights on the curve; all else of floating type goes straight."""
        if t in {0.0, 1.0}:
            ends = self._start, self._end
            return dict(ends[int(t)])
        a, b, c = self.shares(t)
        moved = a * self.first + b * self.bend + c * self.last
        return self._state(moved.to(self.risk.layout.dtype), t)

    def bend_state(self) -> dict[str, Tensor]:
        """State dict of the bend, with statistics of the middle."""
        return self._state(self.bend.to(self.risk.layout.dtype), 0.5)

    def _state(self, weights: Tensor, t: float) -> dict[str, Tensor]:
        names = self.risk.layout.names
        parts = dict(zip(names, self.risk.layout.split(weights), strict=True))
        state = {}
        for key, value in self._start.items():
            if key in self._names:
                state[key] = parts[self._names[key]].to(wide(value).dtype)
            elif value.is_floating_point() and not torch.equal(value, self._end[key]):
                state[key] = torch.lerp(wide(value), wide(self._end[key]), t)
            else:
                state[key] = value
        return state


def _train(
    path: _Path,
    own: Mapping[str, Tensor],
    training: CurveTraining,
) -> None:
    generator = entropy_generator(training.generator)
    gap = path.last - path.first
    unit = float(gap.norm()) / len(gap) ** 0.5
    noise = torch.randn(
        len(gap), generator=generator, device=generator.device, dtype=gap.dtype
    )
    bend = path.bend.add_(_FIRST_NUDGE * unit * noise.to(gap.device))
    optimizer = torch.optim.Adam([bend], lr=training.learning_rate * unit)
    drawn = torch.rand(training.num_steps, generator=generator, device=generator.device)
    with preserve_tensors(own):
        for t in drawn.tolist():
            load_state(own, path.state_at(t))
            _, gradient = path.risk.value_and_grad()
            bend.grad = path.shares(t)[1] * gradient.to(bend.dtype)
            optimizer.step()
