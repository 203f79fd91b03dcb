"""Probes: gradient noise of somebody's training loop, or at frozen weights."""

from noisekit.probes.frozen import GradientNoise, example_sq_norms, gradient_noise
from noisekit.probes.probe import Probe, attach
from noisekit.probes.reading import Coverage, LayerReading, Reading
from noisekit.probes.selfcheck import SelfCheck, self_check

__all__ = [
    "Coverage",
    "GradientNoise",
    "LayerReading",
    "Probe",
    "Reading",
    "SelfCheck",
    "attach",
    "example_sq_norms",
    "gradient_noise",
    "self_check",
]
