"""The public names, each with its home; read by type checkers and by ``__init__``."""

from noisekit import figures as figures
from noisekit.auditing import audit as audit
from noisekit.core.data import freeze as freeze
from noisekit.core.errors import ClosureError as ClosureError
from noisekit.core.errors import NoisekitError as NoisekitError
from noisekit.core.errors import ProbeWarning as ProbeWarning
from noisekit.core.results import Estimate as Estimate
from noisekit.core.results import Interval as Interval
from noisekit.core.results import Status as Status
from noisekit.core.risk import EmpiricalRisk as EmpiricalRisk
from noisekit.core.vocabulary import quantity as quantity
from noisekit.curvature import EigenPairs as EigenPairs
from noisekit.curvature import FisherOperator as FisherOperator
from noisekit.curvature import GGNOperator as GGNOperator
from noisekit.curvature import (
    GradientCovarianceOperator as GradientCovarianceOperator,
)
from noisekit.curvature import HessianOperator as HessianOperator
from noisekit.curvature import SpectralDensity as SpectralDensity
from noisekit.curvature import adam_preconditioned as adam_preconditioned
from noisekit.curvature import diagonal as diagonal
from noisekit.curvature import frobenius_norm as frobenius_norm
from noisekit.curvature import spectral_density as spectral_density
from noisekit.curvature import top_eigenpairs as top_eigenpairs
from noisekit.curvature import trace as trace
from noisekit.curvature import weight_scaled as weight_scaled
from noisekit.integrations import attach as attach
from noisekit.probes import Probe as Probe
from noisekit.probes import Reading as Reading
from noisekit.probes import example_sq_norms as example_sq_norms
from noisekit.probes import gradient_noise as gradient_noise
from noisekit.probes import hessian_weighted_noise as hessian_weighted_noise
from noisekit.probes import self_check as self_check
from noisekit.records import Runs as Runs
from noisekit.records import open_runs as open_runs
from noisekit.sharpness import AverageCase as AverageCase
from noisekit.sharpness import BatchSharpness as BatchSharpness
from noisekit.sharpness import EdgeOfStability as EdgeOfStability
from noisekit.sharpness import EffectiveDimension as EffectiveDimension
from noisekit.sharpness import EpsilonSharpness as EpsilonSharpness
from noisekit.sharpness import FisherRaoNorm as FisherRaoNorm
from noisekit.sharpness import GaugeFixedLambdaMax as GaugeFixedLambdaMax
from noisekit.sharpness import GradNorm as GradNorm
from noisekit.sharpness import HessianFrobeniusNorm as HessianFrobeniusNorm
from noisekit.sharpness import HessianTrace as HessianTrace
from noisekit.sharpness import LambdaMax as LambdaMax
from noisekit.sharpness import LambdaMin as LambdaMin
from noisekit.sharpness import Measure as Measure
from noisekit.sharpness import Measurement as Measurement
from noisekit.sharpness import PacBayesFlatness as PacBayesFlatness
from noisekit.sharpness import PacBayesSharpness as PacBayesSharpness
from noisekit.sharpness import RelativeFlatness as RelativeFlatness
from noisekit.sharpness import SGDRule as SGDRule
from noisekit.sharpness import SharpnessCard as SharpnessCard
from noisekit.sharpness import WeightedHessianTrace as WeightedHessianTrace
from noisekit.sharpness import WorstCase as WorstCase
from noisekit.sharpness import average_sharpness as average_sharpness
from noisekit.sharpness import batch_sharpness as batch_sharpness
from noisekit.sharpness import check_invariance as check_invariance
from noisekit.sharpness import connecting_curve as connecting_curve
from noisekit.sharpness import edge_of_stability_ratio as edge_of_stability_ratio
from noisekit.sharpness import effective_dimension as effective_dimension
from noisekit.sharpness import epsilon_sharpness as epsilon_sharpness
from noisekit.sharpness import fisher_rao_norm as fisher_rao_norm
from noisekit.sharpness import gauge_fixed_lambda_max as gauge_fixed_lambda_max
from noisekit.sharpness import hessian_frobenius_norm as hessian_frobenius_norm
from noisekit.sharpness import hessian_trace as hessian_trace
from noisekit.sharpness import interpolate as interpolate
from noisekit.sharpness import lambda_max as lambda_max
from noisekit.sharpness import lambda_min as lambda_min
from noisekit.sharpness import loss_slice as loss_slice
from noisekit.sharpness import measure as measure
from noisekit.sharpness import pac_bayes_flatness as pac_bayes_flatness
from noisekit.sharpness import pac_bayes_sharpness as pac_bayes_sharpness
from noisekit.sharpness import relative_flatness as relative_flatness
from noisekit.sharpness import rescaled_twin as rescaled_twin
from noisekit.sharpness import sharpened_twin as sharpened_twin
from noisekit.sharpness import stability_threshold as stability_threshold
from noisekit.sharpness import step_sharpness as step_sharpness
from noisekit.sharpness import track_sharpness as track_sharpness
from noisekit.sharpness import weighted_hessian_trace as weighted_hessian_trace
from noisekit.sharpness import worst_case_sharpness as worst_case_sharpness
from noisekit.train import Recipe as Recipe
from noisekit.train import load_recipe as load_recipe
from noisekit.train import resume as resume
from noisekit.train import revisit as revisit
from noisekit.train import run as run

__version__: str

def __dir__() -> list[str]: ...
