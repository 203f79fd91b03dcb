"""What may be wrong with how a run's batch size and settings change."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.core.references import is_reference
from noisekit.train.recipes.adaptive_policies import KicksBatch
from noisekit.train.recipes.parsing import ParsedSections, parse_sections
from noisekit.train.recipes.phases import CHANGEABLE, with_phase
from noisekit.train.recipes.recipe_errors import Fault
from noisekit.train.recipes.run_spec import RunSections
from noisekit.train.recipes.scheduled_policies import ByClock
from noisekit.train.recipes.timeline import known_in_advance, stretches

CHANGING = ("data", "training", "batch_policy", "phases", "optimizer", "schedule")
"""Sections that say what changes in a run, and what it needs."""


def change_faults(arm: ParsedSections, run: RunSections) -> Iterator[Fault]:
    """Yield what is wrong with the batch policy and with each phase."""
    if not arm.having(CHANGING):
        return
    phases = list(_phase_faults(run))
    yield from phases
    for number, part in enumerate([run] if phases else run.in_phases):
        prefix = f"phases[{number}].set." if number else ""
        for fault in _policy_faults(part):
            yield Fault(f"{prefix}{fault.key}", fault.text)


def _phase_faults(run: RunSections) -> Iterator[Fault]:
    """Yield settings that cannot change in mid-run, or that do not fit."""
    table = run.model_dump(mode="json", include=set(CHANGING) - {"phases"})
    for number, phase in enumerate(run.phases, start=1):
        prefix = f"phases[{number}].set"
        fixed = list(phase.unchangeable)
        for key in fixed:
            text = f"cannot change in mid-run; what can is {', '.join(CHANGEABLE)}"
            yield Fault(f"{prefix}.{key}", text)
        if fixed:
            return
        table = with_phase(table, phase.set)
        parsed = parse_sections(table)
        faults = [f for f in parsed.faults if f.key.split(".")[0] in table]
        yield from (Fault(f"{prefix}.{fault.key}", fault.text) for fault in faults)
        if faults:
            return


def _policy_faults(run: RunSections) -> Iterator[Fault]:
    """Yield what is wrong with a batch policy; one of the user's own is not asked."""
    policy, there = run.batch_policy, run.data.train
    if is_reference(policy.name):
        return
    try:
        made = policy.build(run.training.batch_size)
        _, largest = made.bounds()
        if not is_reference(run.optimizer.name):
            made.check_optimizer(run.optimizer.build([nn.Parameter(torch.empty(0))]))
    except UsageError as error:
        yield Fault("batch_policy", str(error).rstrip("."))
        return
    if policy.name == "inner_product_test" and run.training.microbatch is not None:
        yield Fault(
            "batch_policy.name",
            "'inner_product_test' needs all examples of an update at once, got "
            "training.microbatch; leave that out, or use 'norm_test'",
        )
    if largest > max(there, run.training.batch_size):
        yield Fault(
            "batch_policy",
            f"may ask for {largest} examples, data.train has {there}; set its max to "
            "at most that",
        )


def timeline_faults(run: RunSections) -> Iterator[Fault]:
    """Yield a batch that does not fit into its epoch, where batches are to divide."""
    if run.training.epoch_end != "divides":
        return
    policies = [part.batch_policy for part in run.in_phases]
    kicks = [p for p in policies if isinstance(p, KicksBatch) and p.at_epoch_ends]
    if kicks and all(isinstance(p, ByClock | KicksBatch) for p in policies):
        yield from _kick_faults(run, kicks)
        return
    if not known_in_advance(run):
        yield Fault(
            "training.epoch_end",
            f"under batch_policy.name = {run.batch_policy.name!r} needs 'run_on', "
            "'ragged' or 'drop', since no size that follows readings is sure to "
            "divide what is left of an epoch, got 'divides'",
        )
        return
    try:
        for _ in stretches(run):
            pass
    except UsageError as error:
        yield Fault("training.epoch_end", str(error).rstrip("."))


def _kick_faults(run: RunSections, kicks: Iterable[KicksBatch]) -> Iterator[Fault]:
    """Yield sizes that divide no epoch; they change at its end alone."""
    there = run.data.train
    sizes = [("batch_policy.small", kick.small) for kick in kicks]
    for key, size in (*sizes, ("training.batch_size", run.training.batch_size)):
        if there % size:
            text = f"needs to divide data.train ({there}), got {size}"
            yield Fault(key, f"{text}; or set training.epoch_end to 'drop' or 'ragged'")
