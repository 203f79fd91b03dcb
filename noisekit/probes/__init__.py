"""Probes: gradient noise of somebody's training loop, or at frozen weights."""

from noisekit.probes.attachment import attach
from noisekit.probes.estimators.tokens import TokenCount
from noisekit.probes.frozen import GradientNoise, example_sq_norms, gradient_noise
from noisekit.probes.frozen_curvature import hessian_weighted_noise
from noisekit.probes.probe import Probe
from noisekit.probes.quantities.gradient_norms import GradientNorms
from noisekit.probes.quantities.step_quantity import HessianForms, StepQuantity
from noisekit.probes.reading import Coverage, LayerReading, Reading
from noisekit.probes.schedule import Overhead
from noisekit.probes.selfcheck import SelfCheck, self_check

__all__ = [
    "Coverage",
    "GradientNoise",
    "GradientNorms",
    "HessianForms",
    "LayerReading",
    "Overhead",
    "Probe",
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
