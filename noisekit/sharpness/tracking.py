"""The largest Hessian eigenvalues along a training, at a few products per visit."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import pandas as pd
import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import Fraction, PositiveInt, check_settings
from noisekit.curvature.eigenvalues.lanczos import EigenPairs, top_eigenpairs
from noisekit.curvature.eigenvalues.subsample_start import can_be_subsampled
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.measures.stability import edge_of_stability_ratio
from noisekit.sharpness.sgd_rule import check_steps_of_mean


@dataclass(frozen=True, slots=True)
class SharpnessReading:
    """Sharpness at one visit.

    Attributes:
        step: The optimizer step at which it was measured.
        lambda_max: The largest eigenvalue, with its residual as ``bound``.
        eigenvalues: The ``k`` largest, the first included.
        lambda_min: The smallest one, if tracked.
        overlap: Share of the last visit's ``k`` eigenvectors that lies in the span of
            this visit's, from 0 to 1; ``None`` at the first visit.
        edge_ratio: ``lambda_max`` in units of the optimizer's threshold of stability,
            where one was given.
        num_matvecs: Products with the Hessian of all data.
        num_screening_matvecs: Products with the Hessian of an eighth of the data.
    """

    step: int
    lambda_max: Estimate
    eigenvalues: tuple[Estimate, ...]
    lambda_min: Estimate | None
    overlap: float | None
    edge_ratio: Estimate | None
    num_matvecs: int
    num_screening_matvecs: int

    def row(self) -> dict[str, float | int | str | None]:
        """Return the reading as one flat row of a table."""
        first = self.lambda_max
        return {
            "step": self.step,
            "lambda_max": first.value,
            "residual": first.bound,
            "status": str(first.status),
            **{f"lambda_{i + 1}": e.value for i, e in enumerate(self.eigenvalues)},
            "lambda_min": None if self.lambda_min is None else self.lambda_min.value,
            "overlap": self.overlap,
            "edge_ratio": None if self.edge_ratio is None else self.edge_ratio.value,
            "num_matvecs": self.num_matvecs,
            "num_screening_matvecs": self.num_screening_matvecs,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Return the reading of which ``dataclasses.asdict`` made ``fields``.

        Args:
            fields: Plain values, as JSON has them.
        """
        single = ("lambda_max", "lambda_min", "edge_ratio")
        read = {name: _estimate_of(fields[name]) for name in single}
        several = tuple(_estimate_of(value) for value in fields["eigenvalues"])
        return cls(**{**fields, **read, "eigenvalues": several})


def _estimate_of(fields: Mapping[str, Any] | None) -> Estimate | None:
    if fields is None:
        return None
    source = fields["error_source"] and ErrorSource(fields["error_source"])
    status = Status(fields["status"])
    return Estimate(**{**fields, "error_source": source, "status": status})


@dataclass(frozen=True, slots=True)
class TrackedEigenvalues:
    """Which eigenvalues are tracked.

    Attributes:
        k: How many of the largest.
        smallest: Whether to measure the smallest one as well.
        tol: Wanted relative accuracy.
    """

    k: PositiveInt = 1
    smallest: bool = False
    tol: Fraction = 1e-3

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self)


_LARGEST = TrackedEigenvalues()


class SharpnessTracker:
    """Measures the top of the Hessian's spectrum when called from a training loop.

    Where the data can be sampled, each visit starts from the eigenvectors of a random
    eighth of them, which is as good a start as the last visit's vectors and cannot be
    trapped by them. Elsewhere it begins with those vectors and random directions.

    Attributes:
        every: Steps between visits.
        readings: One for each visit, oldest first.
    """

    @checked
    def __init__(
        self,
        risk: EmpiricalRisk,
        *,
        every: PositiveInt = 100,
        targets: TrackedEigenvalues = _LARGEST,
        optimizer: torch.optim.Optimizer | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set up without measuring; see :func:`track_sharpness`.

        Raises:
            UsageError: If ``every`` is below 1, or the optimizer's threshold of
                stability is unknown, as it is of a sum loss.
        """
        if optimizer is not None:
            check_steps_of_mean(risk.reduction)
            edge_of_stability_ratio(Estimate(0.0), optimizer)
        self.every = every
        self.readings: list[SharpnessReading] = []
        self._hessian = HessianOperator(risk)
        self._targets = targets
        self._optimizer = optimizer
        self._generator = entropy_generator(generator)
        self._vectors = self._lowest = torch.empty(self._hessian.shape[0], 0)

    def __repr__(self) -> str:
        """Write how often it measures, and how often it has."""
        return (
            f"<SharpnessTracker every {self.every} steps: {len(self.readings)} taken>"
        )

    def __call__(self, step: int) -> SharpnessReading | None:
        """Measure if ``step`` is a multiple of ``every``; else return ``None``."""
        return self.update(step) if step % self.every == 0 else None

    def update(self, step: int | None = None) -> SharpnessReading:
        """Measure now.

        Args:
            step: For the record; by default ``every`` after the last one.
        """
        if step is None:
            step = self.readings[-1].step + self.every if self.readings else 0
        with self._hessian as hessian:
            top = self._pairs(hessian, "LA", self._targets.k, self._vectors)
            low = None
            if self._targets.smallest:
                low = self._pairs(hessian, "SA", 1, self._lowest)
        reading = self._reading(step, top, low)
        self._vectors = top.start
        self._lowest = self._lowest if low is None else low.start
        self.readings.append(reading)
        return reading

    def frame(self) -> pd.DataFrame:
        """Return a table with a row for each visit."""
        return pd.DataFrame([reading.row() for reading in self.readings])

    def state_dict(self) -> dict[str, Tensor]:
        """Return vectors, random state and readings, to resume from.

        All of it is tensors, which ``torch.load(..., weights_only=True)`` and
        safetensors read: vectors ``(j, P)``, and readings as the bytes of JSON.
        """
        readings = json.dumps([asdict(reading) for reading in self.readings])
        return {
            "vectors": self._vectors.T.contiguous(),
            "lowest": self._lowest.T.contiguous(),
            "generator": self._generator.get_state(),
            "readings": torch.frombuffer(
                bytearray(readings.encode()), dtype=torch.uint8
            ),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where ``state_dict`` was taken.

        Raises:
            UsageError: If the vectors are of another model.
        """
        size = self._hessian.shape[0]
        for name in ("vectors", "lowest"):
            result = state[name].shape[1]
            if result != size:
                raise UsageError(
                    f"the tracker's state needs vectors of {size} parameters, got "
                    f"{result}; load it beside the model that it was saved with."
                )
        # Sums round by how operands lie in memory, which for a mapped file is anyhow.
        self._vectors, self._lowest = (
            state[name].clone().T for name in ("vectors", "lowest")
        )
        self._generator.set_state(state["generator"].cpu())
        text = bytes(state["readings"].tolist())
        self.readings = [SharpnessReading.from_fields(f) for f in json.loads(text)]

    def _pairs(
        self,
        hessian: HessianOperator,
        which: Literal["LA", "SA"],
        k: int,
        before: Tensor,
    ) -> EigenPairs:
        usable = before.shape[1] > 0 and not can_be_subsampled(hessian)
        return top_eigenpairs(
            hessian,
            k,
            which=which,
            tol=self._targets.tol,
            generator=self._generator,
            start=before if usable else None,
        )

    def _reading(
        self, step: int, top: EigenPairs, low: EigenPairs | None
    ) -> SharpnessReading:
        eigenvalues = tuple(top.estimate(i) for i in range(self._targets.k))
        ratio = None
        if self._optimizer is not None:
            ratio = edge_of_stability_ratio(eigenvalues[0], self._optimizer)
        parts = [top] if low is None else [top, low]
        return SharpnessReading(
            step=step,
            lambda_max=eigenvalues[0],
            eigenvalues=eigenvalues,
            lambda_min=None if low is None else low.estimate(),
            overlap=self._overlap(top.vectors),
            edge_ratio=ratio,
            num_matvecs=sum(pairs.num_matvecs for pairs in parts),
            num_screening_matvecs=sum(p.num_screening_matvecs for p in parts),
        )

    def _overlap(self, vectors: Tensor) -> float | None:
        """Mean squared cosine between the spans of two visits' eigenvectors."""
        k = self._targets.k
        if self._vectors.shape[1] < k:
            return None
        before = self._vectors[:, :k].to(vectors)
        return float((before.T @ vectors).double().square().sum() / k)


@checked
def track_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    every: PositiveInt = 100,
    targets: TrackedEigenvalues = _LARGEST,
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> SharpnessTracker:
    """Return a tracker of the largest Hessian eigenvalues, to be called each step.

    The data are read and checked now, and held; each visit then costs four to five
    products on 1,024 examples or more, or about six on fewer. The model is restored
    bit for bit, and nothing is drawn from the global random state, so that a tracked
    training takes the same course as another.

    Arguments that are not listed are those of
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        model: The model that is being trained, or its :class:`EmpiricalRisk`.
        every: Steps between visits.
        targets: Which eigenvalues, and how accurately.
        optimizer: Gives the threshold of stability, by its rate and momentum at the
            visit; a ``torch.optim.SGD``.
        generator: Source of random directions; by default a fresh one.

    Raises:
        UsageError: If ``every`` is below 1, or the optimizer's threshold of stability
            is unknown.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> tracker = nk.track_sharpness(model, loss_fn, batches, every=10)
        >>> for step in range(20):
        ...     reading = tracker(step)  # after optimizer.step(); often None
        >>> [(r.step, round(r.lambda_max.value, 4)) for r in tracker.readings]
        [(0, 4.0), (10, 4.0)]
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    return SharpnessTracker(
        risk,
        every=every,
        targets=targets,
        optimizer=optimizer,
        generator=generator,
    )
