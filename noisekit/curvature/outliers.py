"""Outliers of a spectrum: eigenvalues outside of the bulk."""

import itertools
from dataclasses import dataclass

import numpy as np

from noisekit.core.results import Estimate
from noisekit.curvature.quadrature import Quadrature

# A Ritz value is taken for an eigenvalue of its own once it is known this well, and
# there is a gap of this many usual distances of nodes between it and the bulk.
_ATOM_RESIDUAL = 1e-2
_ATOM_SPACINGS = 4.0


@dataclass(frozen=True, slots=True)
class Atom:
    """An eigenvalue outside of the bulk of the spectrum.

    Attributes:
        value: Where it is.
        residual: How far off that may be.
        weight: Its share of all eigenvalues, with its error over probes; the number
            of copies is that times ``size``.
    """

    value: float
    residual: float
    weight: Estimate


def outliers(quadrature: Quadrature) -> tuple[tuple[Atom, ...], np.ndarray]:
    """Return the outliers common to all probes, and which nodes they are.

    Returns:
        The outliers, the largest first, and a mask of the quadrature's nodes.
    """
    is_atom = np.zeros(quadrature.nodes.shape, dtype=bool)
    counts = (quadrature.weights > 0.0).sum(1)
    rows = np.arange(len(counts))
    atoms = []
    for upper in (True, False):
        # Position of the depth-th node of each probe, counted from this end.
        ends = [counts - 1 - d if upper else 0 * counts + d for d in range(min(counts))]
        for index in ends[: _num_outliers(quadrature, ends)]:
            if not is_atom[rows, index].any():
                is_atom[rows, index] = True
                atoms.append(_atom(quadrature, index))
    atoms.sort(key=lambda atom: -atom.value)
    return tuple(atoms), is_atom


def _num_outliers(quadrature: Quadrature, ends: list[np.ndarray]) -> int:
    """Number of nodes at one end that are separated from all others.

    Those outside the last gap that is wide relative to the median distance of nodes, as
    long as each is the same eigenvalue in every probe, within its residual.
    """
    rows = np.arange(len(quadrature.nodes))
    lines = [
        line[share > 0.0]
        for line, share in zip(quadrature.nodes, quadrature.weights, strict=True)
    ]
    usual = max(float(np.median(np.diff(x))) if len(x) > 2 else 0.0 for x in lines)
    outside = 0
    for depth, (index, inner) in enumerate(itertools.pairwise(ends)):
        values, residuals = (
            quadrature.nodes[rows, index],
            quadrature.residuals[rows, index],
        )
        gap = float(np.abs(values - quadrature.nodes[rows, inner]).min())
        if max(np.ptp(values), residuals.max()) > _ATOM_RESIDUAL * gap:
            break
        if gap > _ATOM_SPACINGS * usual:
            outside = depth + 1
    return outside


def _atom(quadrature: Quadrature, index: np.ndarray) -> Atom:
    rows = np.arange(len(index))
    chosen = np.zeros(quadrature.nodes.shape)
    chosen[rows, index] = 1.0
    best = int(quadrature.residuals[rows, index].argmin())
    return Atom(
        value=float(quadrature.nodes[best, index[best]]),
        residual=float(quadrature.residuals[best, index[best]]),
        weight=quadrature.means(chosen),
    )
