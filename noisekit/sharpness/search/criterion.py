"""The increase of error or loss under noise or displacement of a given size."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature.random_vectors import normal_vector
from noisekit.sharpness.data_error import batch_parts, batch_shares, gathered
from noisekit.sharpness.search.ascent import ascend
from noisekit.sharpness.search.regions import ball

Criterion = Literal["error", "loss"]
MAGNITUDE_FLOOR = 1e-3
"""Added to magnitude-aware noise and displacements, so that zero weights move too."""


class CriterionIncrease:
    """How much the criterion increases, with the same draws for every size.

    To be used within ``risk.evaluating()``.

    Attributes:
        criterion: What increases: the share of misclassified examples, or the loss.
        magnitude_aware: Whether sizes are in proportion to each weight.
        seed: Seed of the generator of noise and random starts.
        start: The criterion at the weights themselves.
        num_evaluations: Evaluations of the criterion spent.
        num_grads: Gradient evaluations spent.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        criterion: Criterion,
        magnitude_aware: bool,
        generator: torch.Generator,
    ) -> None:
        self.criterion: Criterion = criterion
        self.magnitude_aware = magnitude_aware
        self.seed = generator.initial_seed()
        # Common random numbers: with the same draws at every size the increase is a
        # deterministic function of it, which bisection needs.
        bits = torch.randint(2**62, (), generator=generator, device=generator.device)
        self._stream_seed = int(bits)
        self._risk = risk
        self._origin = risk.vector()
        self._slope: tuple[float, Tensor] | None = None
        self.num_evaluations = 0
        self.num_grads = 0
        self.start = self._measure(None)

    def under_noise(self, sigma: float, num_draws: int) -> Tensor:
        """Return the increase at each draw of the noise, ``(draws,)``."""
        increases = [self._measure(point) for point in self._points(sigma, num_draws)]
        return torch.tensor(increases, dtype=torch.float64) - self.start

    def parts_under_noise(self, sigma: float, num_draws: int) -> Tensor:
        """Return each batch's part of the same increases, ``(draws, batches)``."""
        parts = [self.parts_at(point) for point in self._points(sigma, num_draws)]
        return torch.stack(parts) - self.parts_at(None)

    def parts_at(self, vector: Tensor | None) -> Tensor:
        """Return each batch's part of the criterion at ``vector``, ``(batches,)``."""
        self.num_evaluations += 1
        if self.criterion == "loss":
            return batch_parts(self._risk, vector)
        wrong = []
        with self._risk.at(vector):
            for _, batch in self._risk.weighted_batches():
                error = self._risk.on([batch]).evaluate().error
                assert error is not None  # or the start had been refused
                wrong.append(error * _num_classified(batch))
        counts = self._counts()
        own = torch.tensor(wrong, dtype=torch.float64, device=self._origin.device)
        return gathered(own, self._risk) / counts.sum()

    def shares(self) -> Tensor | None:
        """Return the batches' shares of what the criterion is a mean over."""
        shares = batch_shares(self._risk)
        if shares is None or self.criterion == "loss":
            return shares
        counts = self._counts()
        return counts / counts.sum()

    def _counts(self) -> Tensor:
        """Return how many targets of each batch are classes."""
        batches = self._risk.weighted_batches()
        own = torch.tensor(
            [_num_classified(batch) for _, batch in batches],
            dtype=torch.float64,
            device=self._origin.device,
        )
        return gathered(own, self._risk)

    def highest_point(
        self, alpha: float, *, steps: int, restarts: int
    ) -> Tensor | None:
        """Return the end point of a gradient ascent; ``None`` if that is not finite.

        The box of size ``alpha`` is about the weights.
        """
        if self._slope is None:
            self._slope = self._risk.value_and_grad()
            self.num_grads += 1
        radii = torch.full_like(self._origin, alpha)
        if self.magnitude_aware:
            radii = alpha * self._origin.abs() + MAGNITUDE_FLOOR
        box = ball("linf", radii, 1.0)
        result = ascend(
            self._risk,
            box,
            origin=self._origin,
            start=self._slope,
            steps=steps,
            restarts=restarts,
            generator=stream(self._stream_seed, "ascent"),
        )
        self.num_grads += result.num_grads
        if not math.isfinite(result.increase):
            return None
        return self._origin + box.displacement(result.coordinates)

    def under_ascent(self, alpha: float, *, steps: int, restarts: int) -> float:
        """Return the increase at the end point of a gradient ascent."""
        point = self.highest_point(alpha, steps=steps, restarts=restarts)
        return math.inf if point is None else self._measure(point) - self.start

    def _points(self, sigma: float, num_draws: int) -> Iterator[Tensor]:
        """Yield the weights plus each draw of the noise, of variance (σ w)² + 1e-6."""
        like = (self._origin.dtype, self._origin.device)
        floor = MAGNITUDE_FLOOR if self.magnitude_aware else 0.0
        unit = self._origin if self.magnitude_aware else torch.ones_like(self._origin)
        scale = (sigma**2 * unit.square() + floor**2).sqrt()
        for draw in range(num_draws):
            source = stream(self._stream_seed, "draw", draw)
            yield self._origin + scale * normal_vector(len(scale), source, like)

    def _measure(self, vector: Tensor | None) -> float:
        self.num_evaluations += 1
        result = self._risk.evaluate(vector, error=self.criterion == "error")
        if self.criterion == "loss":
            return result.loss if math.isfinite(result.loss) else math.inf
        if result.error is None:
            raise UsageError(
                "criterion='error' needs outputs (n, classes) and targets that are "
                "classes (n,), got others; use criterion='loss'."
            )
        return result.error


def _num_classified(batch: Batch) -> int:
    """Return how many targets are classes; negative ones mean "ignore"."""
    return int((batch[1] >= 0).sum())
