"""The spectral density of an operator, smooth around its outliers."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate
from noisekit.core.settings import NumPoints, NumSamples, Positive, PositiveInt
from noisekit.curvature.operators.operator import MatrixLike, SymmetricOperator
from noisekit.curvature.outliers import Atom, outliers
from noisekit.curvature.quadrature import Quadrature, spectral_quadrature

# A bandwidth is half the mean distance to the two neighbouring nodes, and at least a
# thousandth of the typical one, or a millionth of the largest magnitude.
_SPACING_SHARE = 0.5
_RELATIVE_FLOOR = 1e-3
_ZERO = 1e-6
_OFFSETS = np.linspace(-4.0, 4.0, 25)


@dataclass(frozen=True, slots=True)
class LogDensity:
    """A density over the magnitude of eigenvalues of one sign.

    Attributes:
        grid: ``(g,)`` magnitudes.
        density: ``(g,)`` share of all eigenvalues per decade.
        low: ``(g,)`` lower end of the 95 % band over probes.
        high: ``(g,)`` upper end.
        mass: Share of all eigenvalues that have this sign, without those that are not
            resolved from zero.
    """

    grid: np.ndarray = field(repr=False)
    density: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    mass: Estimate

    def __str__(self) -> str:
        """Write the share of all eigenvalues and where they are looked for."""
        return (
            f"density per decade over magnitudes from {self.grid[0]:.2g} to "
            f"{self.grid[-1]:.2g}: {self.mass} of all eigenvalues"
        )


@dataclass(frozen=True, slots=True)
class SpectralDensity:
    """The density of eigenvalues: a smooth part and atoms, of mass one together.

    Attributes:
        grid: ``(g,)`` eigenvalues, finer where nodes are close.
        density: ``(g,)`` of the smooth part, atoms left out [1 / eigenvalue].
        low: ``(g,)`` lower end of the 95 % band over probes, point by point.
        high: ``(g,)`` upper end.
        nodes: ``(probes, m)`` of the quadrature.
        weights: ``(probes, m)``, each row of sum one, atoms included.
        bandwidths: ``(probes, m)``: standard deviation of the normal curve of a
            node; 0 for an atom.
        atoms: Outliers, the largest first.
        quadrature: What it all comes from.
    """

    grid: np.ndarray = field(repr=False)
    density: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    nodes: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    bandwidths: np.ndarray = field(repr=False)
    atoms: tuple[Atom, ...] = field(repr=False)
    quadrature: Quadrature

    @property
    def num_matvecs(self) -> int:
        """Products spent."""
        return self.quadrature.num_matvecs

    @property
    def negative_share(self) -> Estimate:
        """Share of eigenvalues below zero, up to ``zero_share`` more."""
        below = (self.nodes < 0.0) & ~self.quadrature.about_zero
        return self.quadrature.means(below.astype(float))

    @property
    def zero_share(self) -> Estimate:
        """Share of eigenvalues not resolved from zero by the products made."""
        return self.quadrature.means(self.quadrature.about_zero.astype(float))

    def __str__(self) -> str:
        """Write the range, the outliers, the shares below and about zero, the cost."""
        values = ", ".join(f"{atom.value:.4g}" for atom in self.atoms)
        return "\n".join(
            [
                f"density of {self.quadrature.size} eigenvalues from "
                f"{self.nodes.min():.4g} to {self.nodes.max():.4g}, "
                f"{self.num_matvecs} products:",
                f"  outliers: {values or 'none'}",
                f"  share below zero: {self.negative_share}",
                f"  share about zero: {self.zero_share}",
            ]
        )

    def frame(self) -> pd.DataFrame:
        """Return everything that is drawn as one table.

        Columns ``axis`` (``linear``, ``log``), ``kind`` (``density``, ``atom``,
        ``zero``), ``eigenvalue``, ``value`` (a density, or the share of an atom or of
        what is not resolved from zero), ``low``, ``high``.
        """
        lines = [("linear", self.grid, self.density, self.low, self.high)]
        for sign in (-1, 1):
            logs = self.log_density(sign)
            lines.append(("log", sign * logs.grid, logs.density, logs.low, logs.high))
        columns = ("eigenvalue", "value", "low", "high")
        tables = [
            pd.DataFrame(dict(zip(columns, line, strict=True)))
            .sort_values("eigenvalue")
            .assign(axis=axis, kind="density")
            for axis, *line in lines
        ]
        shares = [("linear", "atom", a.value, a.weight) for a in self.atoms]
        for axis, kind, value, share in [
            *shares,
            ("log", "zero", 0.0, self.zero_share),
        ]:
            around = share.interval()
            row = [value, share.value, max(around.low, 0.0), around.high]
            tables.append(
                pd.DataFrame([row], columns=list(columns)).assign(axis=axis, kind=kind)
            )
        table = pd.concat(tables, ignore_index=True)
        return table[["axis", "kind", *columns]]

    @checked
    def log_density(
        self, sign: Literal[1, -1] = 1, *, num_points: NumPoints = 200
    ) -> LogDensity:
        """Return the density per decade of the eigenvalues of one sign, atoms included.

        What is not resolved from zero belongs to neither sign; ``zero_share`` is its
        share. A node is a normal curve over the logarithm,
        with half the distance between its neighbours as its standard deviation, and
        between a twentieth and half of a decade.

        Raises:
            UsageError: If ``sign`` is not 1 or -1.
        """
        scale = self.quadrature.scale
        magnitudes = sign * self.nodes
        inside = (magnitudes > 0.0) & ~self.quadrature.about_zero
        logs = np.log10(np.where(inside, magnitudes, 1.0))
        widths = np.clip(_half_spacings(np.where(inside, logs, np.nan)), 0.05, 0.5)
        top = np.log10(scale) if scale > 0 else 0.0
        grid = np.linspace(top + np.log10(_ZERO) - 0.5, top + 1.0, num_points)
        weights = np.where(inside, self.weights, 0.0)
        curves = _smoothed(grid, logs, weights, widths)
        mean, low, high = _band(curves)
        mass = self.quadrature.means(inside.astype(float))
        return LogDensity(10**grid, mean, low, high, mass)


@checked
def spectral_density(
    H: SymmetricOperator | Tensor | np.ndarray | MatrixLike,
    *,
    num_probes: NumSamples = 4,
    num_steps: PositiveInt = 40,
    bandwidth: Positive | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Estimate how eigenvalues are distributed, by stochastic Lanczos quadrature.

    Each node of the quadrature becomes a normal curve. Its bandwidth is half the
    distance between the nodes beside it, which is what Lanczos resolves there: one
    large outlier does not blur the bulk, as a single bandwidth of the range over the
    number of nodes does. Outliers, that is Ritz values that have converged in every
    probe and stand apart, are given as atoms with their weights and are not smoothed.

    Args:
        H: A symmetric operator or matrix, or another library's operator.
        num_probes: Random vectors; the bands are over them.
        num_steps: Most products for each.
        bandwidth: The same for all nodes, in place of their own.
        generator: Of the vectors; fresh entropy by default.

    Raises:
        UsageError: If there are fewer than 2 probes or 1 step, ``bandwidth`` is not
            positive, or a product is not finite.

    Source:
        Ghorbani et al. 2019, arXiv:1901.10159, section 2, for the quadrature.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> H = torch.diag(torch.linspace(-1.0, 3.0, 200))
        >>> density = nk.spectral_density(H, num_probes=4, generator=generator)
        >>> print(density.negative_share)  # a quarter of them is below zero
        0.1972 ± 0.0048
    """
    quadrature = spectral_quadrature(
        H, num_probes=num_probes, num_steps=num_steps, generator=generator
    )
    if not np.isfinite(quadrature.nodes).all():
        raise UsageError(
            "a spectral density needs finite products, got NaN or infinity; check "
            "the weights: a training that diverged has no spectrum."
        )
    atoms, is_atom = outliers(quadrature)
    widths = _bandwidths(quadrature, is_atom)
    if bandwidth is not None:
        widths = np.full_like(widths, bandwidth)
    widths = np.where(is_atom, 0.0, widths)
    grid = _grid(quadrature.nodes, widths, is_atom)
    smooth_weights = np.where(is_atom, 0.0, quadrature.weights)
    curves = _smoothed(
        grid, quadrature.nodes, smooth_weights, np.where(is_atom, 1, widths)
    )
    # Normalize the trapezoidal sum on the grid to the smooth part's weight.
    area = float(np.trapezoid(curves.mean(0), grid))
    curves = curves * (smooth_weights.sum(1).mean() / area if area > 0 else 1.0)
    mean, low, high = _band(curves)
    return SpectralDensity(
        grid=grid,
        density=mean,
        low=low,
        high=high,
        nodes=quadrature.nodes,
        weights=quadrature.weights,
        bandwidths=widths,
        atoms=atoms,
        quadrature=quadrature,
    )


def _bandwidths(quadrature: Quadrature, is_atom: np.ndarray) -> np.ndarray:
    """Half the distance between the nodes beside each, atoms left out."""
    usable = ~is_atom & (quadrature.weights > 0.0)
    spacings = _half_spacings(np.where(usable, quadrature.nodes, np.nan))
    known = spacings[usable & (spacings > 0.0)]
    typical = float(np.median(known)) if len(known) else max(quadrature.scale, 1.0)
    floor = max(_RELATIVE_FLOOR * typical, _ZERO * quadrature.scale)
    return np.asarray(np.maximum(spacings, floor))


def _half_spacings(values: np.ndarray) -> np.ndarray:
    """Per row, part of the distance between neighbours; 0 where there are none."""
    widths = np.zeros(values.shape)
    for row, line in enumerate(values):
        order = np.argsort(line)[: int(np.isfinite(line).sum())]
        if len(order) < 2:
            continue
        steps = np.diff(line[order])  # at the ends one distance serves for both
        before = np.concatenate([steps[:1], steps])
        after = np.concatenate([steps, steps[-1:]])
        widths[row, order] = _SPACING_SHARE * (before + after) / 2
    return widths


def _grid(nodes: np.ndarray, widths: np.ndarray, is_atom: np.ndarray) -> np.ndarray:
    """Points around each node, as close as its bandwidth asks, atoms left out."""
    centres, spreads = nodes[~is_atom], widths[~is_atom]
    if not len(centres):
        centres, spreads = nodes.reshape(-1), np.ones(nodes.size)
    points = (centres[:, None] + spreads[:, None] * _OFFSETS).ravel()
    # Thinned to a sixth of the bandwidth, so that overlapping curves share points.
    order = np.argsort(points)
    least = np.repeat(spreads, len(_OFFSETS))[order] / 6
    kept: list[float] = []
    for point, distance in zip(points[order].tolist(), least.tolist(), strict=True):
        if not kept or point - kept[-1] >= distance:
            kept.append(point)
    return np.array(kept)


def _smoothed(
    grid: np.ndarray, nodes: np.ndarray, weights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Each probe's sum of normal curves on the grid, ``(probes, g)``."""
    curves = []
    for line, shares, spreads in zip(nodes, weights, widths, strict=True):
        # sum_k w_k N(t; x_k, s_k^2) with nodes x, weights w and bandwidths s.
        scores = (grid[:, None] - line) / spreads  # (g, m)
        heights = shares / (spreads * math.sqrt(2 * math.pi))
        curves.append(np.exp(-0.5 * scores**2) @ heights)
    return np.stack(curves)


def _band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over probes and its pointwise 95 % interval, never below zero."""
    count = len(curves)
    mean = curves.mean(0)
    half = stdtrit(count - 1, 0.975) * curves.std(0, ddof=1) / count**0.5
    return mean, np.maximum(mean - half, 0.0), mean + half
