"""The Hessian of a loss: products, eigenvalues, traces; nothing trains here."""

from noisekit.curvature.hessian import HessianOperator
from noisekit.curvature.lanczos import EigenPairs, top_eigenpairs
from noisekit.curvature.operator import MatrixLike, SymmetricOperator, as_operator
from noisekit.curvature.reference import pyhessian_top_eigenvalue
from noisekit.curvature.traces import (
    DiagonalEstimate,
    diagonal,
    trace,
    weighted_trace,
)

__all__ = [
    "DiagonalEstimate",
    "EigenPairs",
    "HessianOperator",
    "MatrixLike",
    "SymmetricOperator",
    "as_operator",
    "diagonal",
    "pyhessian_top_eigenvalue",
    "top_eigenpairs",
    "trace",
    "weighted_trace",
]
