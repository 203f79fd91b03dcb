"""Gauss quadrature of a spectrum by Lanczos from random vectors."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.settings import NumSamples, PositiveInt
from noisekit.curvature.eigenvalues.krylov import KrylovBasis
from noisekit.curvature.operators.operator import (
    MatrixLike,
    SymmetricOperator,
    as_operator,
)
from noisekit.curvature.random_vectors import shared_generator

# A node below 1e-6 of the largest magnitude counts as zero, and the sign of a node is
# known where its residual is below a tenth of its own magnitude.
_ZERO = 1e-6
_KNOWN_SIGN = 0.1


@dataclass(frozen=True, slots=True)
class Quadrature:
    """Nodes and weights of Gauss quadratures of a spectrum, one per random vector.

    For a probe ``z`` with ``|z| = 1`` the weighted sum of ``f`` over its ``m`` nodes
    approximates ``z' f(H) z``, exactly for polynomials of degree ``2 m - 1``; and the
    mean of ``z' f(H) z`` over random ``z`` is the mean of ``f`` over all eigenvalues.

    Attributes:
        nodes: ``(probes, m)``, ascending. Where the Krylov space ended earlier, the
            last node is repeated with no weight.
        weights: ``(probes, m)``, each row of sum one.
        residuals: ``(probes, m)``, distance of a node from an eigenvalue at most.
        size: Number of eigenvalues.
        num_matvecs: Products spent.
    """

    nodes: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    residuals: np.ndarray = field(repr=False)
    size: int
    num_matvecs: int

    @property
    def scale(self) -> float:
        """Largest magnitude of a node, about the norm of the operator."""
        return float(np.abs(self.nodes).max())

    @property
    def about_zero(self) -> np.ndarray:
        """Mask of the nodes not resolved from zero, ``(probes, m)``.

        A quadrature determines the share of eigenvalues below a point only up to the
        weights of the nodes on either side of it. The two nodes beside zero are
        therefore of unknown sign, unless a residual far below their magnitude shows
        that they are eigenvalues.

        Source:
            Szegő 1939, "Orthogonal polynomials", theorem 3.41.1.
        """
        zero = _ZERO * self.scale
        below = np.where(self.nodes < -zero, self.nodes, -np.inf)
        above = np.where(self.nodes > zero, self.nodes, np.inf)
        beside = self.nodes == below.max(1, keepdims=True)
        beside |= self.nodes == above.min(1, keepdims=True)
        rough = self.residuals > _KNOWN_SIGN * np.abs(self.nodes)
        return np.asarray((np.abs(self.nodes) <= zero) | (beside & rough))

    def means(self, values: np.ndarray) -> Estimate:
        """Return the mean over eigenvalues of a function, given at the nodes.

        Args:
            values: ``(probes, m)``, the function at each node.
        """
        samples = (self.weights * values).sum(1)
        count = len(samples)
        mean = float(samples.mean())
        return Estimate(
            value=mean,
            stderr=float(samples.std(ddof=1)) / count**0.5,
            error_source=ErrorSource.PROBES,
            num_samples=count,
            dof=count - 1,
            status=Status.OK if np.isfinite(mean) else Status.DIVERGED,
            num_matvecs=self.num_matvecs,
        )

    def __str__(self) -> str:
        """Write how many nodes there are, and from where to where."""
        probes, nodes = self.nodes.shape
        return (
            f"quadrature of {self.size} eigenvalues from {self.nodes.min():.4g} to "
            f"{self.nodes.max():.4g}: {probes} probes of {nodes} nodes, "
            f"{self.num_matvecs} products"
        )


@checked
def spectral_quadrature(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    *,
    num_probes: NumSamples = 4,
    num_steps: PositiveInt = 40,
    generator: torch.Generator | None = None,
) -> Quadrature:
    """Return nodes and weights of the spectrum by stochastic Lanczos quadrature.

    Lanczos is fully reorthogonalized and ends with its Krylov space: a ghost would be
    an eigenvalue counted twice. Memory is the basis of one probe, ``num_steps``
    vectors.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        num_probes: Random vectors.
        num_steps: Most products for each.
        generator: Of the vectors; fresh entropy by default.

    Raises:
        UsageError: If there are fewer than 2 probes or 1 step.

    Source:
        Golub and Meurant 2010, "Matrices, moments and quadrature", chapter 4; Ghorbani
        et al. 2019, arXiv:1901.10159, section 2.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> H = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
        >>> quadrature = spectral_quadrature(H, num_probes=2, generator=generator)
        >>> quadrature.nodes[0].round(6).tolist()
        [1.0, 2.0, 3.0, 4.0, 5.0]
        >>> quadrature.weights.sum(axis=1).round(6).tolist()
        [1.0, 1.0]
    """
    operator = as_operator(H)
    drawn = shared_generator(generator, operator.ranks, operator.device)
    runs = [_run(operator, num_steps, drawn) for _ in range(num_probes)]
    width = max(len(nodes) for nodes, _, _ in runs)
    return Quadrature(
        nodes=np.stack([_padded(nodes, width, "edge") for nodes, _, _ in runs]),
        weights=np.stack([_padded(w, width, "constant") for _, w, _ in runs]),
        residuals=np.stack([_padded(r, width, "edge") for _, _, r in runs]),
        size=operator.shape[0],
        num_matvecs=sum(len(nodes) for nodes, _, _ in runs),
    )


def _run(
    operator: SymmetricOperator, num_steps: int, drawn: torch.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending nodes, their weights and residuals from one random vector."""
    steps = min(num_steps, operator.shape[0])
    basis = KrylovBasis(
        operator,
        which="SA",
        capacity=steps,
        num_kept=0,
        block_size=1,
        generator=drawn,
    )
    basis.begin(torch.empty(operator.shape[0], 0))
    basis.step()
    while not basis.ended and basis.num_matvecs < steps:
        basis.extend()
        basis.step()
    # Golub and Welsch 1969: Gauss quadrature of the measure sum_i (u_i' z)^2 at
    # lambda_i has the eigenvalues of the projected matrix T as its nodes, and the
    # squared first entries of T's eigenvectors as its weights.
    ritz = basis.ritz()
    if not ritz.finite:
        nothing = np.full(1, np.nan)
        return nothing, np.ones(1), nothing
    # The first basis vector is the probe z, so that (y' e_1)^2 = (x' z)^2 of x = Q y.
    return ritz.values, ritz.coefficients[0] ** 2, ritz.residuals


def _padded(values: np.ndarray, width: int, how: str) -> np.ndarray:
    missing = (0, width - len(values))
    if how == "edge":
        return np.pad(values, missing, mode="edge")
    return np.pad(values, missing)
