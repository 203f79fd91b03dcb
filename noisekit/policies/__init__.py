"""Batch-size policies: what the next update's batch is, from what was observed."""

from noisekit.policies.point import At
from noisekit.policies.policy import Decision, Need, Observation, Policy, State
from noisekit.policies.scheduled import (
    AdaBatch,
    Constant,
    GrowInsteadOfDecay,
    Growth,
    Scheduled,
    Table,
)

__all__ = [
    "AdaBatch",
    "At",
    "Constant",
    "Decision",
    "GrowInsteadOfDecay",
    "Growth",
    "Need",
    "Observation",
    "Policy",
    "Scheduled",
    "State",
    "Table",
]
