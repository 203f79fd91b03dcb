"""How sharp a minimum is: eigenvalues, boxes, balls, noise, lines, rescaled twins."""

from noisekit.sharpness.audit_report import AuditReport, AuditRow, AuditVerdict
from noisekit.sharpness.auditing import audit
from noisekit.sharpness.average import (
    AverageSharpness,
    average_sharpness,
    average_sharpness_of,
)
from noisekit.sharpness.batch import (
    BatchSharpness,
    batch_sharpness,
    batch_sharpness_of,
    step_sharpness,
    step_sharpness_of,
)
from noisekit.sharpness.card import CardRow, Conditions, SharpnessCard
from noisekit.sharpness.chains import FreeScale, free_scales
from noisekit.sharpness.curves import ConnectingCurve, connecting_curve
from noisekit.sharpness.directions import Directions
from noisekit.sharpness.epsilon import (
    EpsilonSharpness,
    epsilon_sharpness,
    epsilon_sharpness_of,
)
from noisekit.sharpness.fisher_rao import fisher_rao_norm, fisher_rao_norm_of
from noisekit.sharpness.free_rescalings import free_rescalings
from noisekit.sharpness.invariance import check_invariance
from noisekit.sharpness.invariance_report import (
    Invariance,
    InvarianceReport,
    RescalingEffect,
)
from noisekit.sharpness.landscape import (
    Interpolation,
    Valley,
    interpolate,
    interpolate_of,
)
from noisekit.sharpness.measures import MEASURES as SHARPNESS_MEASURES
from noisekit.sharpness.measures import Measure
from noisekit.sharpness.measuring import measure, measure_of
from noisekit.sharpness.pac_bayes import (
    PacBayesFlatness,
    pac_bayes_flatness,
    pac_bayes_flatness_of,
    pac_bayes_sharpness,
    pac_bayes_sharpness_of,
)
from noisekit.sharpness.relative_flatness import (
    relative_flatness,
    relative_flatness_of,
)
from noisekit.sharpness.search import SearchPlan
from noisekit.sharpness.slices import LossSlice, loss_slice, loss_slice_of
from noisekit.sharpness.spectrum import (
    gauge_fixed_lambda_max,
    gauge_fixed_lambda_max_of,
    lambda_max,
    lambda_max_of,
    lambda_min,
    lambda_min_of,
)
from noisekit.sharpness.stability import (
    SGDRule,
    edge_of_stability_ratio,
    stability_threshold,
)
from noisekit.sharpness.subject import MeasureSettings
from noisekit.sharpness.traces import (
    effective_dimension,
    effective_dimension_of,
    hessian_frobenius_norm,
    hessian_frobenius_norm_of,
    hessian_trace,
    hessian_trace_of,
    weighted_hessian_trace,
    weighted_hessian_trace_of,
)
from noisekit.sharpness.tracking import (
    SharpnessReading,
    SharpnessTracker,
    track_sharpness,
)
from noisekit.sharpness.twins import (
    RescaledTwin,
    rescale_layers,
    rescale_neurons,
    rescaled_twin,
    rescaled_twin_of,
    sharpened_twin,
    sharpened_twin_of,
)
from noisekit.sharpness.worst_case import (
    WorstCaseSharpness,
    worst_case_sharpness,
    worst_case_sharpness_of,
)

__all__ = [
    "SHARPNESS_MEASURES",
    "AuditReport",
    "AuditRow",
    "AuditVerdict",
    "AverageSharpness",
    "BatchSharpness",
    "CardRow",
    "Conditions",
    "ConnectingCurve",
    "Directions",
    "EpsilonSharpness",
    "FreeScale",
    "Interpolation",
    "Invariance",
    "InvarianceReport",
    "LossSlice",
    "Measure",
    "MeasureSettings",
    "PacBayesFlatness",
    "RescaledTwin",
    "RescalingEffect",
    "SGDRule",
    "SearchPlan",
    "SharpnessCard",
    "SharpnessReading",
    "SharpnessTracker",
    "Valley",
    "WorstCaseSharpness",
    "audit",
    "average_sharpness",
    "average_sharpness_of",
    "batch_sharpness",
    "batch_sharpness_of",
    "check_invariance",
    "connecting_curve",
    "edge_of_stability_ratio",
    "effective_dimension",
    "effective_dimension_of",
    "epsilon_sharpness",
    "epsilon_sharpness_of",
    "fisher_rao_norm",
    "fisher_rao_norm_of",
    "free_rescalings",
    "free_scales",
    "gauge_fixed_lambda_max",
    "gauge_fixed_lambda_max_of",
    "hessian_frobenius_norm",
    "hessian_frobenius_norm_of",
    "hessian_trace",
    "hessian_trace_of",
    "interpolate",
    "interpolate_of",
    "lambda_max",
    "lambda_max_of",
    "lambda_min",
    "lambda_min_of",
    "loss_slice",
    "loss_slice_of",
    "measure",
    "measure_of",
    "pac_bayes_flatness",
    "pac_bayes_flatness_of",
    "pac_bayes_sharpness",
    "pac_bayes_sharpness_of",
    "relative_flatness",
    "relative_flatness_of",
    "rescale_layers",
    "rescale_neurons",
    "rescaled_twin",
    "rescaled_twin_of",
    "sharpened_twin",
    "sharpened_twin_of",
    "stability_threshold",
    "step_sharpness",
    "step_sharpness_of",
    "track_sharpness",
    "weighted_hessian_trace",
    "weighted_hessian_trace_of",
    "worst_case_sharpness",
    "worst_case_sharpness_of",
]
