"""Convex regions around the weights in which the highest loss is sought.

A point of a region has coordinates ``z`` of its own; ``A z`` is the displacement of the
weights, and ``A' g`` the gradient in those coordinates.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.curvature.random_vectors import normal_vector

BallNorm = Literal["l2", "linf"]


def weight_units(weights: Tensor, *, adaptive: bool, eta: float = 0.0) -> Tensor:
    """Return the scale ``T`` of each weight's displacement: 1, or ``|w| + eta``.

    Raises:
        UsageError: If the scale is zero for all weights.
    """
    if not adaptive:
        return torch.ones_like(weights)
    units = weights.abs() + eta
    if not bool((units > 0).any()):
        raise UsageError(
            "adaptive displacements are in proportion to the weights and need one "
            "that is not zero, got only zeros; set eta= above 0, or adaptive=False."
        )
    return units


class Region(ABC):
    """A convex set of displacements ``A z`` of the weights, symmetric about zero."""

    @abstractmethod
    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return ``A z``, the change of the weights."""

    @abstractmethod
    def gradient(self, grad: Tensor) -> Tensor:
        """Return ``A' g``, the gradient in the region's own coordinates."""

    @abstractmethod
    def support_point(self, grad: Tensor) -> Tensor:
        """Return the point where a linear loss of this gradient is highest.

        Zero where the gradient is zero.
        """

    @abstractmethod
    def linear_increase(self, grad: Tensor) -> float:
        """Return the support function: the increase of a linear loss at that point."""

    @abstractmethod
    def project(self, coordinates: Tensor) -> Tensor:
        """Return the nearest point of the region."""

    @abstractmethod
    def random_point(self, generator: torch.Generator) -> Tensor:
        """Return a random point of the boundary."""


class EuclideanBall(Region):
    """``|z|_2 <= rho`` with displacements ``T z``.

    In the coordinates ``z = T^{-1} δ`` the ellipsoid ``|T^{-1} δ| <= rho`` of ASAM is a
    ball, and nothing is divided by ``T``: a weight of zero, whose ``T`` is zero in an
    adaptive ball, stays fixed.
    """

    def __init__(self, units: Tensor, rho: float) -> None:
        self._units, self._rho = units, rho

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return ``T z``."""
        return self._units * coordinates

    def gradient(self, grad: Tensor) -> Tensor:
        """Return ``T g``."""
        return self._units * grad

    def support_point(self, grad: Tensor) -> Tensor:
        """Return ``rho g / |g|``."""
        # Scaled by the largest entry first: squares below 1e-19 underflow in float32.
        largest = grad.abs().max()
        scaled = grad / torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.vector_norm(scaled)
        return self._rho * (scaled / torch.where(norm > 0, norm, 1.0))

    def linear_increase(self, grad: Tensor) -> float:
        """Return ``rho |g|_2``."""
        return self._rho * float(torch.linalg.vector_norm(grad.double()))

    def project(self, coordinates: Tensor) -> Tensor:
        """Return the point, scaled back to the sphere if it is outside."""
        norm = torch.linalg.vector_norm(coordinates)
        return coordinates * torch.where(norm > self._rho, self._rho / norm, 1.0)

    def random_point(self, generator: torch.Generator) -> Tensor:
        """Return a point that is uniform on the sphere."""
        like = (self._units.dtype, self._units.device)
        return self.support_point(normal_vector(len(self._units), generator, like))


class Box(Region):
    """``|z_i| <= radius_i``; displacements are ``T z``, or ``z`` itself.

    Attributes:
        radius: Half the box's width in each coordinate.
    """

    def __init__(self, radius: Tensor, units: Tensor | None = None) -> None:
        self.radius, self._units = radius, units

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return ``T z``."""
        return coordinates if self._units is None else self._units * coordinates

    def gradient(self, grad: Tensor) -> Tensor:
        """Return ``T g``."""
        return grad if self._units is None else self._units * grad

    def support_point(self, grad: Tensor) -> Tensor:
        """Return the corner in the direction of the gradient's signs."""
        return grad.sign() * self.radius

    def linear_increase(self, grad: Tensor) -> float:
        r"""Return :math:`\sum_i |g_i|\, \mathrm{radius}_i`."""
        return float((grad.double().abs() * self.radius.double()).sum())

    def project(self, coordinates: Tensor) -> Tensor:
        """Return the point with each coordinate clamped to its radius."""
        return coordinates.clamp(-self.radius, self.radius)

    def random_point(self, generator: torch.Generator) -> Tensor:
        """Return a random corner."""
        bits = torch.randint(
            2, self.radius.shape, generator=generator, device=generator.device
        )
        return (2 * bits - 1).to(self.radius) * self.radius

    def random_inner_point(self, generator: torch.Generator) -> Tensor:
        """Return a point that is uniform in the box."""
        uniform = torch.rand(
            self.radius.shape, generator=generator, device=generator.device
        )
        return (2 * uniform - 1).to(self.radius) * self.radius


def keskar_box(origin: Tensor, epsilon: float) -> Box:
    """Return the box in which every weight moves by ``epsilon (|x_i| + 1)`` at most."""
    return Box(epsilon * (origin.abs() + 1))


def ball(norm: BallNorm, units: Tensor, rho: float) -> Region:
    """Return the ball of radius ``rho`` in a norm, each weight in its unit."""
    if norm == "l2":
        return EuclideanBall(units, rho)
    return Box(torch.full_like(units, rho), units)
