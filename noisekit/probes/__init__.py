"""Probes: gradient noise of a training loop, or at frozen weights."""

from noisekit.core.errors import ClosureError, ProbeWarning
from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.probes.advice import BatchSizeAdvice
from noisekit.probes.attachment import attach_probe
from noisekit.probes.capture.tokens import TokenCount
from noisekit.probes.dataset_curvature import hessian_weighted_noise
from noisekit.probes.dataset_noise import (
    GradientNoise,
    example_sq_norms,
    gradient_noise,
)
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.options import ProbeOptions
from noisekit.probes.probe import Probe
from noisekit.probes.reading import Coverage, LayerReading, Reading, ShareRead
from noisekit.probes.schedule import Overhead
from noisekit.probes.self_check import SelfCheck, self_check
from noisekit.probes.step_metrics.gradient_norms import GradientNorms
from noisekit.probes.step_metrics.metric import MetricStep, RankSum, StepMetric

__all__ = [
    "BatchSizeAdvice",
    "ClosureError",
    "Coverage",
    "GradientNoise",
    "GradientNorms",
    "HessianForms",
    "LayerReading",
    "MetricStep",
    "NoiseEstimator",
    "Overhead",
    "Probe",
    "ProbeOptions",
    "ProbeWarning",
    "RankSum",
    "Reading",
    "SelfCheck",
    "ShareRead",
    "StepInputs",
    "StepMetric",
    "StepNoise",
    "StepQuantity",
    "TokenCount",
    "attach_probe",
    "example_sq_norms",
    "gradient_noise",
    "hessian_weighted_noise",
    "self_check",
]
