"""How sharp a minimum is: eigenvalues, boxes, lines, and rescaled twins."""

from noisekit.sharpness.chains import FreeScale, free_scales
from noisekit.sharpness.epsilon import (
    EpsilonSharpness,
    epsilon_sharpness,
    epsilon_sharpness_of,
)
from noisekit.sharpness.invariance import (
    RescaledTwin,
    rescale_layers,
    rescale_neurons,
    rescaled_twin,
    rescaled_twin_of,
)
from noisekit.sharpness.landscape import (
    Interpolation,
    Valley,
    interpolate,
    interpolate_of,
)
from noisekit.sharpness.search import SearchPlan
from noisekit.sharpness.spectrum import (
    gauge_fixed_lambda_max,
    gauge_fixed_lambda_max_of,
    hessian_trace_of,
    lambda_max,
    lambda_max_of,
    lambda_min_of,
    weighted_hessian_trace_of,
)

__all__ = [
    "EpsilonSharpness",
    "FreeScale",
    "Interpolation",
    "RescaledTwin",
    "SearchPlan",
    "Valley",
    "epsilon_sharpness",
    "epsilon_sharpness_of",
    "free_scales",
    "gauge_fixed_lambda_max",
    "gauge_fixed_lambda_max_of",
    "hessian_trace_of",
    "interpolate",
    "interpolate_of",
    "lambda_max",
    "lambda_max_of",
    "lambda_min_of",
    "rescale_layers",
    "rescale_neurons",
    "rescaled_twin",
    "rescaled_twin_of",
    "weighted_hessian_trace_of",
]
