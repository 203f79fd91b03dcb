"""Gradient noise from norms: pure functions of statistics, no model in sight."""

from noisekit.noise.criteria import (
    SampleTest,
    gradient_diversity,
    inner_product_test,
    norm_test,
    orthogonality_test,
)
from noisekit.noise.distribution import LogHistogram
from noisekit.noise.elementwise import (
    ElementMoments,
    SignalToNoise,
    cabs_batch_size,
    evidence_stopping,
    gradient_signal_to_noise,
)
from noisekit.noise.hessian_noise import (
    HessianNoiseScale,
    hessian_noise_of_sums,
    hessian_noise_scale,
)
from noisekit.noise.moments import GradientMoments
from noisekit.noise.scale import (
    NoiseParts,
    NoiseScale,
    per_example_noise_scale,
    ratio_of_averages,
    two_batch_noise_scale,
)
from noisekit.noise.step_statistics import (
    inner_product_statistic,
    norm_statistic,
    orthogonality_statistic,
    signal_ratios,
)

__all__ = [
    "ElementMoments",
    "GradientMoments",
    "HessianNoiseScale",
    "LogHistogram",
    "NoiseParts",
    "NoiseScale",
    "SampleTest",
    "SignalToNoise",
    "cabs_batch_size",
    "evidence_stopping",
    "gradient_diversity",
    "gradient_signal_to_noise",
    "hessian_noise_of_sums",
    "hessian_noise_scale",
    "inner_product_statistic",
    "inner_product_test",
    "norm_statistic",
    "norm_test",
    "orthogonality_statistic",
    "orthogonality_test",
    "per_example_noise_scale",
    "ratio_of_averages",
    "signal_ratios",
    "two_batch_noise_scale",
]
