"""Curvature of a loss: products, eigenvalues, traces, spectra; nothing trains here."""

from noisekit.curvature.density import (
    LogDensity,
    SpectralDensity,
    spectral_density,
)
from noisekit.curvature.eigenvalues.lanczos import EigenPairs, top_eigenpairs
from noisekit.curvature.eigenvalues.pyhessian import pyhessian_top_eigenvalue
from noisekit.curvature.norms import (
    effective_dimension,
    frobenius_norm,
    participation_ratio,
)
from noisekit.curvature.operators.covariance import GradientCovarianceOperator
from noisekit.curvature.operators.fisher import FisherOperator, MonteCarlo
from noisekit.curvature.operators.ggn import GGNOperator
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.operators.hvp_selection import Trial
from noisekit.curvature.operators.operator import (
    LinearCombination,
    MatrixLike,
    SymmetricOperator,
    as_operator,
)
from noisekit.curvature.operators.preconditioned import (
    ScaledOperator,
    adam_preconditioned,
    weight_scaled,
)
from noisekit.curvature.operators.risk_operator import RiskOperator
from noisekit.curvature.outliers import Atom
from noisekit.curvature.quadrature import Quadrature, spectral_quadrature
from noisekit.curvature.traces import (
    DiagonalEstimate,
    Target,
    diagonal,
    trace,
    weighted_trace,
)

__all__ = [
    "Atom",
    "DiagonalEstimate",
    "EigenPairs",
    "FisherOperator",
    "GGNOperator",
    "GradientCovarianceOperator",
    "HessianOperator",
    "LinearCombination",
    "LogDensity",
    "MatrixLike",
    "MonteCarlo",
    "Quadrature",
    "RiskOperator",
    "ScaledOperator",
    "SpectralDensity",
    "SymmetricOperator",
    "Target",
    "Trial",
    "adam_preconditioned",
    "as_operator",
    "diagonal",
    "effective_dimension",
    "frobenius_norm",
    "participation_ratio",
    "pyhessian_top_eigenvalue",
    "spectral_density",
    "spectral_quadrature",
    "top_eigenpairs",
    "trace",
    "weight_scaled",
    "weighted_trace",
]
