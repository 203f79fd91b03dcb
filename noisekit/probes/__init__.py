"""Probes: gradient noise of somebody's training loop, or at frozen weights."""

from noisekit.core.errors import ClosureError, ProbeWarning
from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.probes.attachment import attach
from noisekit.probes.capture.tokens import TokenCount
from noisekit.probes.dataset_curvature import hessian_weighted_noise
from noisekit.probes.dataset_noise import (
    GradientNoise,
    example_sq_norms,
    gradient_noise,
)
from noisekit.probes.probe import Probe
from noisekit.probes.reading import Coverage, LayerReading, Reading
from noisekit.probes.schedule import Overhead
from noisekit.probes.self_check import SelfCheck, self_check
from noisekit.probes.step_metrics.gradient_norms import GradientNorms

__all__ = [
    "ClosureError",
    "Coverage",
    "GradientNoise",
    "GradientNorms",
    "HessianForms",
    "LayerReading",
    "Overhead",
    "Probe",
    "ProbeWarning",
    "Reading",
    "SelfCheck",
    "StepQuantity",
    "TokenCount",
    "attach",
    "example_sq_norms",
    "gradient_noise",
    "hessian_weighted_noise",
    "self_check",
]
