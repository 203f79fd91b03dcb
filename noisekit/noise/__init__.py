"""Gradient noise from norms: pure functions of statistics, no model in sight."""

from noisekit.noise.moments import GradientMoments
from noisekit.noise.scale import (
    NoiseParts,
    NoiseScale,
    per_example_noise_scale,
    ratio_of_averages,
    two_batch_noise_scale,
)

__all__ = [
    "GradientMoments",
    "NoiseParts",
    "NoiseScale",
    "per_example_noise_scale",
    "ratio_of_averages",
    "two_batch_noise_scale",
]
