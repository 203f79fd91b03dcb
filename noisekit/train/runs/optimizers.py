"""Optimisers and learning rates, as a recipe states them."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from noisekit.train.recipes.run_spec import OptimizerSpec, RunSections, ScheduleSpec

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def build_optimizer(
    spec: OptimizerSpec, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimiser; its rate is set anew before each update."""
    listed = list(parameters)
    fused = all(p.device.type in _FUSED_DEVICES for p in listed)
    if spec.name == "sgd":
        return torch.optim.SGD(
            listed,
            lr=spec.learning_rate,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
        )
    kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
    return kind(
        listed,
        lr=spec.learning_rate,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=fused,
    )


def learning_rate_at(run: RunSections, update: int) -> float:
    """Return the rate of the update after ``update`` earlier ones.

    The rate is a function of the count alone, so that a resumed run needs no
    scheduler's state. ``max_updates`` is what the cosine reaches zero at and what
    fractional milestones are fractions of.
    """
    factor = _warmup(run.schedule, update) * _decay(
        run.schedule, update, run.max_updates
    )
    return run.optimizer.learning_rate * factor


def _warmup(schedule: ScheduleSpec, update: int) -> float:
    if update >= schedule.warmup_updates:
        return 1.0
    return (update + 1) / schedule.warmup_updates


def _decay(schedule: ScheduleSpec, update: int, last: int) -> float:
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        places = (m * last if m < 1 else m for m in schedule.milestones)
        return float(schedule.gamma ** sum(update >= place for place in places))
    begin = schedule.warmup_updates
    share = max(0.0, (update - begin) / max(1, last - begin))
    return 0.5 * (1.0 + math.cos(math.pi * share))
