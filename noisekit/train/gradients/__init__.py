"""Gradient rules: what fills ``.grad`` before the optimizer steps."""

from noisekit.train.gradients.rules import GradientRules
from noisekit.train.gradients.terms import TermSpec
from noisekit.train.gradients.trust_ratio import TrustRatio

__all__ = ["GradientRules", "TermSpec", "TrustRatio"]
