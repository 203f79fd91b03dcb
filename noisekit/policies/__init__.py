"""Batch-size policies: what the next update's batch is, from what was observed."""

from noisekit.policies.accumulation import GradientAccumulation, Update
from noisekit.policies.adaptive import Adaptive, AtIntervals, Wanted
from noisekit.policies.cabs import CABS
from noisekit.policies.kicks import Kicks, Progress, RelativeDecrease, StallCriterion
from noisekit.policies.memory import (
    BatchSizeSearch,
    BatchSizeTrial,
    find_batch_size,
)
from noisekit.policies.noise_scale import GradientThreshold, NoiseScaleTarget
from noisekit.policies.point import At
from noisekit.policies.policy import Decision, Need, Observation, Policy, State
from noisekit.policies.rates import RateRule, apply_rate
from noisekit.policies.readings import quantities_for, values_of_reading
from noisekit.policies.sample_tests import InnerProductTest, NormTest
from noisekit.policies.sampler import AdaptiveBatchSampler
from noisekit.policies.scheduled import (
    AdaBatch,
    Constant,
    GrowInsteadOfDecay,
    Growth,
    Scheduled,
    Table,
)

POLICIES: tuple[type[Policy], ...] = (
    Constant,
    Table,
    Growth,
    AdaBatch,
    GrowInsteadOfDecay,
    CABS,
    NormTest,
    InnerProductTest,
    NoiseScaleTarget,
    GradientThreshold,
    Kicks,
)
"""All policies; their names are those of recipes."""

__all__ = [
    "CABS",
    "POLICIES",
    "AdaBatch",
    "Adaptive",
    "AdaptiveBatchSampler",
    "At",
    "AtIntervals",
    "BatchSizeSearch",
    "BatchSizeTrial",
    "Constant",
    "Decision",
    "GradientAccumulation",
    "GradientThreshold",
    "GrowInsteadOfDecay",
    "Growth",
    "InnerProductTest",
    "Kicks",
    "Need",
    "NoiseScaleTarget",
    "NormTest",
    "Observation",
    "Policy",
    "Progress",
    "RateRule",
    "RelativeDecrease",
    "Scheduled",
    "StallCriterion",
    "State",
    "Table",
    "Update",
    "Wanted",
    "apply_rate",
    "find_batch_size",
    "quantities_for",
    "values_of_reading",
]
