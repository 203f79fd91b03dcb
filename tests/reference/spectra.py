"""Symmetric matrices of every kind of spectrum that solvers fail on, known exactly."""

from collections.abc import Callable

import numpy as np

from tests.reference.curvature import symmetric_with_spectrum


def clustered(rng: np.random.Generator, size: int) -> np.ndarray:
    """A few groups of nearly equal values."""
    centres = rng.normal(size=4)
    return rng.choice(centres, size) + 1e-4 * rng.standard_normal(size)


def degenerate(rng: np.random.Generator, size: int) -> np.ndarray:
    """The largest value three times, the rest spread below it."""
    return np.concatenate([[2.0] * 3, rng.uniform(-1.0, 1.0, size - 3)])


def indefinite(rng: np.random.Generator, size: int) -> np.ndarray:
    """Both ends nearly as far from zero."""
    inner = rng.uniform(-0.9, 0.9, size - 2)
    return np.concatenate([[1.0, -0.99], inner])


def graded(rng: np.random.Generator, size: int) -> np.ndarray:
    """Ten orders of magnitude, signs at random."""
    return np.geomspace(1e4, 1e-6, size) * rng.choice([-1.0, 1.0], size)


def low_rank(rng: np.random.Generator, size: int) -> np.ndarray:
    """Three values, the rest exactly zero."""
    return np.concatenate([rng.uniform(1.0, 3.0, 3), np.zeros(size - 3)])


def exponential_bulk(rng: np.random.Generator, size: int) -> np.ndarray:
    """No gap anywhere: values fall off like an exponential distribution."""
    return rng.exponential(0.1, size)


def outliers(rng: np.random.Generator, size: int) -> np.ndarray:
    """A bulk about zero and five large values, as in trained networks."""
    bulk = 0.05 * rng.standard_normal(size - 5)
    return np.concatenate([rng.uniform(2.0, 20.0, 5), bulk])


SPECTRA: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "clustered": clustered,
    "degenerate": degenerate,
    "indefinite": indefinite,
    "graded": graded,
    "low_rank": low_rank,
    "exponential_bulk": exponential_bulk,
    "outliers": outliers,
}


def matrix_of(kind: str, *, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix and its eigenvalues as ``eigvalsh`` has them, ascending."""
    values = SPECTRA[kind](np.random.default_rng(seed), size)
    matrix = symmetric_with_spectrum(values.tolist(), seed=seed)
    return matrix, np.linalg.eigvalsh(matrix)
