"""How sharp a minimum is: eigenvalues, boxes, balls, noise, lines, rescaled twins."""

from noisekit.sharpness.card import CardRow, Conditions, SharpnessCard
from noisekit.sharpness.invariance import check_invariance
from noisekit.sharpness.invariance_report import (
    Invariance,
    InvarianceReport,
    RescalingEffect,
)
from noisekit.sharpness.landscape.curves import (
    ConnectingCurve,
    CurveTraining,
    connecting_curve,
)
from noisekit.sharpness.landscape.directions import Directions, DirectionSpec
from noisekit.sharpness.landscape.interpolation import (
    Interpolation,
    Valley,
    interpolate,
)
from noisekit.sharpness.landscape.slices import LossSlice, loss_slice
from noisekit.sharpness.measurement import Measure, Measurement, MeasurementContext
from noisekit.sharpness.measures import MEASURES as SHARPNESS_MEASURES
from noisekit.sharpness.measures.average import (
    AverageCase,
    AverageCaseResult,
    average_sharpness,
)
from noisekit.sharpness.measures.batch import (
    BatchSharpness,
    BatchSharpnessResult,
    batch_sharpness,
    step_sharpness,
)
from noisekit.sharpness.measures.eigenvalues import (
    GaugeFixedLambdaMax,
    LambdaMax,
    LambdaMin,
    gauge_fixed_lambda_max,
    lambda_max,
    lambda_min,
)
from noisekit.sharpness.measures.epsilon import (
    EpsilonSharpness,
    EpsilonSharpnessResult,
    epsilon_sharpness,
)
from noisekit.sharpness.measures.fisher_rao import FisherRaoNorm, fisher_rao_norm
from noisekit.sharpness.measures.gradient import GradNorm
from noisekit.sharpness.measures.pac_bayes import (
    PacBayesFlatness,
    PacBayesResult,
    PacBayesSharpness,
    pac_bayes_flatness,
    pac_bayes_sharpness,
)
from noisekit.sharpness.measures.relative_flatness import (
    RelativeFlatness,
    relative_flatness,
)
from noisekit.sharpness.measures.spectral_norms import (
    EffectiveDimension,
    HessianFrobeniusNorm,
    effective_dimension,
    hessian_frobenius_norm,
)
from noisekit.sharpness.measures.stability import (
    EdgeOfStability,
    edge_of_stability_ratio,
    stability_threshold,
)
from noisekit.sharpness.measures.traces import (
    HessianTrace,
    WeightedHessianTrace,
    hessian_trace,
    weighted_hessian_trace,
)
from noisekit.sharpness.measures.worst_case import (
    WorstCase,
    WorstCaseResult,
    worst_case_sharpness,
)
from noisekit.sharpness.measuring import measure
from noisekit.sharpness.rescaling.chains import FreeScale, free_scales
from noisekit.sharpness.rescaling.free_rescalings import free_rescalings
from noisekit.sharpness.rescaling.twins import (
    RescaledTwin,
    rescale_layers,
    rescale_neurons,
    rescaled_twin,
    sharpened_twin,
)
from noisekit.sharpness.sgd_rule import SGDRule
from noisekit.sharpness.tracking import (
    SharpnessReading,
    SharpnessTracker,
    TrackedEigenvalues,
    track_sharpness,
)

__all__ = [
    "SHARPNESS_MEASURES",
    "AverageCase",
    "AverageCaseResult",
    "BatchSharpness",
    "BatchSharpnessResult",
    "CardRow",
    "Conditions",
    "ConnectingCurve",
    "CurveTraining",
    "DirectionSpec",
    "Directions",
    "EdgeOfStability",
    "EffectiveDimension",
    "EpsilonSharpness",
    "EpsilonSharpnessResult",
    "FisherRaoNorm",
    "FreeScale",
    "GaugeFixedLambdaMax",
    "GradNorm",
    "HessianFrobeniusNorm",
    "HessianTrace",
    "Interpolation",
    "Invariance",
    "InvarianceReport",
    "LambdaMax",
    "LambdaMin",
    "LossSlice",
    "Measure",
    "Measurement",
    "MeasurementContext",
    "PacBayesFlatness",
    "PacBayesResult",
    "PacBayesSharpness",
    "RelativeFlatness",
    "RescaledTwin",
    "RescalingEffect",
    "SGDRule",
    "SharpnessCard",
    "SharpnessReading",
    "SharpnessTracker",
    "TrackedEigenvalues",
    "Valley",
    "WeightedHessianTrace",
    "WorstCase",
    "WorstCaseResult",
    "average_sharpness",
    "batch_sharpness",
    "check_invariance",
    "connecting_curve",
    "edge_of_stability_ratio",
    "effective_dimension",
    "epsilon_sharpness",
    "fisher_rao_norm",
    "free_rescalings",
    "free_scales",
    "gauge_fixed_lambda_max",
    "hessian_frobenius_norm",
    "hessian_trace",
    "interpolate",
    "lambda_max",
    "lambda_min",
    "loss_slice",
    "measure",
    "pac_bayes_flatness",
    "pac_bayes_sharpness",
    "relative_flatness",
    "rescale_layers",
    "rescale_neurons",
    "rescaled_twin",
    "sharpened_twin",
    "stability_threshold",
    "step_sharpness",
    "track_sharpness",
    "weighted_hessian_trace",
    "worst_case_sharpness",
]
