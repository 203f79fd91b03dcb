"""The balls in which worst-case sharpness is sought, in units of each weight."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.curvature.random_vectors import normal_vector

BallNorm = Literal["l2", "linf"]


def weight_units(weights: Tensor, *, adaptive: bool, eta: float = 0.0) -> Tensor:
    """Return the unit ``T`` in which each weight is displaced: 1, or ``|w| + eta``.

    Raises:
        UsageError: If ``eta`` is negative or given without ``adaptive``, or if no
            weight could move.
    """
    if eta < 0 or (eta > 0 and not adaptive):
        raise UsageError(
            "eta needs to be 0 or more and goes with adaptive=True, got "
            f"eta={eta:g} and adaptive={adaptive}; ASAM uses 0.01."
        )
    if not adaptive:
        return torch.ones_like(weights)
    units = weights.abs() + eta
    if not bool((units > 0).any()):
        raise UsageError(
            "adaptive displacements are in proportion to the weights and need one "
            "that is not zero, got only zeros; set eta= above 0, or adaptive=False."
        )
    return units


class Ball(ABC):
    """Displacements ``T z`` of the weights with ``|z| <= rho`` in some norm.

    Nothing is ever divided by a weight's unit, so that a weight of zero, which has the
    unit zero, simply stays where it is.

    Attributes:
        units: ``T``, one positive or zero number per weight.
        rho: Radius.
    """

    def __init__(self, units: Tensor, rho: float) -> None:
        self.units, self.rho = units, rho

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return ``T z``, the change of the weights."""
        return self.units * coordinates

    def gradient(self, grad: Tensor) -> Tensor:
        """Return ``T g``, the gradient in the ball's own coordinates."""
        return self.units * grad

    @abstractmethod
    def direction(self, grad: Tensor) -> Tensor:
        """Return the steepest direction of norm 1; zero where the gradient is."""

    @abstractmethod
    def project(self, coordinates: Tensor) -> Tensor:
        """Return the point of the ball that is nearest."""

    @abstractmethod
    def random_point(self, generator: torch.Generator) -> Tensor:
        """Return a random point on the ball's surface."""

    @abstractmethod
    def linear_rise(self, grad: Tensor) -> float:
        """Return the largest rise over the ball of a loss with this gradient."""


class EuclideanBall(Ball):
    """``|z|_2 <= rho``."""

    def direction(self, grad: Tensor) -> Tensor:
        """Return ``grad / |grad|``."""
        # Scaled first: the squares of tiny entries would be zero.
        largest = grad.abs().max()
        scaled = grad / torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.vector_norm(scaled)
        return scaled / torch.where(norm > 0, norm, 1.0)

    def project(self, coordinates: Tensor) -> Tensor:
        """Return the point, drawn back to the surface if it is outside."""
        norm = torch.linalg.vector_norm(coordinates)
        return coordinates * torch.where(norm > self.rho, self.rho / norm, 1.0)

    def random_point(self, generator: torch.Generator) -> Tensor:
        """Return a point that is uniform on the sphere."""
        like = (self.units.dtype, self.units.device)
        drawn = normal_vector(len(self.units), generator, like)
        return self.rho * self.direction(drawn)

    def linear_rise(self, grad: Tensor) -> float:
        """Return ``rho |grad|_2``."""
        return self.rho * float(torch.linalg.vector_norm(grad.double()))


class MaximumBall(Ball):
    """``|z_i| <= rho`` for every weight."""

    def direction(self, grad: Tensor) -> Tensor:
        """Return the signs."""
        return grad.sign()

    def project(self, coordinates: Tensor) -> Tensor:
        """Return the point with each coordinate cut off at the radius."""
        return coordinates.clamp(-self.rho, self.rho)

    def random_point(self, generator: torch.Generator) -> Tensor:
        """Return a random corner."""
        bits = torch.randint(
            2, self.units.shape, generator=generator, device=generator.device
        )
        return self.rho * (2 * bits - 1).to(self.units)

    def linear_rise(self, grad: Tensor) -> float:
        """Return ``rho |grad|_1``."""
        return self.rho * float(grad.double().abs().sum())


def ball(norm: BallNorm, units: Tensor, rho: float) -> Ball:
    """Return the ball of a norm.

    Raises:
        UsageError: If the norm is unknown, or the radius is not positive.
    """
    if not 0 < rho < float("inf"):
        raise UsageError(
            f"rho needs to be positive and finite, got {rho}; SAM uses 0.05."
        )
    if norm == "l2":
        return EuclideanBall(units, rho)
    if norm == "linf":
        return MaximumBall(units, rho)
    raise UsageError(f"norm needs to be 'l2' or 'linf', got {norm!r}.")
