"""What a recipe's sections need of each other, beyond each one's own types."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from noisekit.core.errors import UsageError
from noisekit.core.references import is_reference
from noisekit.train.models import uses_batch_norm
from noisekit.train.recipes.catalogue import analyses
from noisekit.train.recipes.change_faults import (
    CHANGING,
    change_faults,
    timeline_faults,
)
from noisekit.train.recipes.optimizers import Sgd
from noisekit.train.recipes.parsing import ParsedSections
from noisekit.train.recipes.points import MAX_UPDATES
from noisekit.train.recipes.policy_section import OF_READINGS
from noisekit.train.recipes.probe_spec import OF_EXAMPLES
from noisekit.train.recipes.recipe_errors import Fault, not_one_of
from noisekit.train.recipes.run_spec import RunSections
from noisekit.train.recipes.schedules import DecayToTheEnd
from noisekit.train.recipes.sections import multiples
from noisekit.train.section import run_id_of

MAX_SNAPSHOTS = 1000


_NEEDS = ("training", "batch_policy", "phases")
"""What has to be known to tell what batch policies need."""


def section_faults(arm: ParsedSections) -> Iterator[Fault]:
    """Yield what is wrong between the sections of one arm.

    A check waits until the sections that it needs can be parsed.
    """
    run = arm.assembled()
    changes = list(change_faults(arm, run))
    yield from changes
    if changes or (run.phases and not arm.having(CHANGING)):
        return  # what follows asks what holds in each phase
    checks = (
        (("data", "training", "batch_policy", "phases"), _batch_faults),
        (("evaluation", "training", "snapshots", "phases"), _evaluation_faults),
        (("data", "training", "snapshots", "batch_policy", "phases"), _snapshot_faults),
        (("data", "training", "schedule"), _schedule_faults),
        (("data", "measure", "snapshots", "training"), _measure_faults),
        (("data", "probe", "optimizer", *_NEEDS), _estimator_faults),
        (("data", "model", "probe", *_NEEDS), _coupling_faults),
        (("data", "augment"), _augment_faults),
        (("data", "model", "training"), _token_faults),
    )
    for needed, check in checks:
        if arm.having(needed):
            yield from check(run)


def _batch_faults(run: RunSections) -> Iterator[Fault]:
    batch, there = run.training.batch_size, run.data.train
    key = "training.batch_size"
    if batch > there:
        yield Fault(key, f"needs at most data.train ({there}) examples, got {batch}")
        return
    if run.phases or run.batch_policy.name != "constant":
        yield from timeline_faults(run)
        return
    whole, rest = divmod(there, batch)
    if rest and run.training.epoch_end == "divides":
        yield Fault(
            key,
            f"needs to divide data.train ({there}), so that every update sees as many "
            f"examples; with {batch}, batch {whole + 1} of each epoch would have "
            f"{rest}. Choose another number, or set training.epoch_end to 'drop', "
            "'ragged' or 'run_on'",
        )
    if run.max_updates > MAX_UPDATES:
        yield Fault(
            "training.stop",
            f"allows {run.max_updates:.3g} updates, at most {MAX_UPDATES:,} are "
            "possible",
        )


def _snapshot_faults(run: RunSections) -> Iterator[Fault]:
    if run.training.batch_size > run.data.train:
        return  # there are no epochs then
    yield from _repeated_snapshot_faults(run)
    if run.phases or run.batch_policy.name != "constant":
        return  # where updates lie in epochs, and the other way, is not that simple
    clock, last = run.clock, run.max_updates
    for name, point in run.snapshots.at.items():
        for unit, place in point.clock_points.items():
            update = clock.updates_to(clock.span(place), run.training.batch_size)
            if update > last:
                yield Fault(
                    f"snapshots.at.{name}.{unit}",
                    f"lies at update {update}, after the last that training.stop "
                    f"allows ({last}); take it earlier or train longer",
                )


def _repeated_snapshot_faults(run: RunSections) -> Iterator[Fault]:
    stop = run.training.stop
    for name, length in run.snapshots.every.items():
        (unit,) = length.keys
        if unit != "share" and getattr(stop, unit) is None:
            yield Fault(
                f"snapshots.every.{name}",
                "needs the unit of training.stop, or a share, so that the names of "
                f"all snapshots are known, got {unit}",
            )
        elif next(multiples(name, length, stop), None) is None:
            yield Fault(f"snapshots.every.{name}", "is longer than training.stop")
    names = [*run.snapshot_names]
    if len(names) > MAX_SNAPSHOTS:
        yield Fault(
            "snapshots.every",
            f"keeps {len(names)} snapshots, at most {MAX_SNAPSHOTS} are possible; "
            "for measures along a run use series",
        )


def _evaluation_faults(run: RunSections) -> Iterator[Fault]:
    """Yield what waits for a training loss that is never evaluated."""
    if "train" in run.evaluation.splits:
        return
    points = {f"snapshots.{name}": p for name, p in run.snapshot_points.items()}
    points["training.stop"] = run.training.stop
    points |= {f"phases[{i}]": p.at for i, p in enumerate(run.phases, start=1)}
    for name, point in points.items():
        if point.loss is not None or point.stalled is not None:
            yield Fault(
                "evaluation.splits",
                f"needs 'train', whose loss {name} waits for; add it",
            )
            return


def _schedule_faults(run: RunSections) -> Iterator[Fault]:
    schedule, end = run.schedule, run.clock.end
    if not isinstance(schedule, DecayToTheEnd) or schedule.warmup is None:
        return
    span = run.clock.span(schedule.warmup.length)
    pairs = ((span.updates, end.updates), (span.cursor, end.cursor))
    if any(math.isfinite(length) and math.isinf(whole) for length, whole in pairs):
        yield Fault(
            "schedule.warmup.length",
            f"under {schedule.name!r} needs the unit of training.stop, or a share",
        )


def _measure_faults(run: RunSections) -> Iterator[Fault]:
    wanted, there = run.measure.num_examples, run.data.train
    if wanted is not None and wanted > there:
        yield Fault(
            "measure.num_examples",
            f"needs at most data.train ({there}) examples, got {wanted}",
        )
    for name, measures in run.measure.at.items():
        # An empty list takes away what a profile's base states, also its snapshot.
        if measures and name not in run.snapshot_names:
            text = not_one_of("a snapshot", name, run.snapshot_names)
            yield Fault(f"measure.at.{name}", text)


def _estimator_faults(run: RunSections) -> Iterator[Fault]:
    """Yield which estimators of gradient noise could never be read, and why."""
    if not run.reads_noise:
        return
    names, training = run.probe.estimator, run.training
    part = training.examples_per_forward
    key = "probe.estimator"
    if "accumulation" in names and part == training.batch_size:
        yield Fault(
            key,
            "'accumulation' compares the micro-batches of an update, so that it needs "
            f"training.microbatch of at most half of the batch ({training.batch_size})"
            ", got none; set it, or use 'auto'",
        )
    if "preconditioned" in names and isinstance(run.optimizer, Sgd):
        yield Fault(
            key,
            "'preconditioned' is the noise that Adam sees, and needs optimizer.name = "
            "'adam' or 'adamw', got 'sgd'; leave it out",
        )
    ghost = run.probe.ghost_batch
    if ghost is not None and 2 * ghost > part:
        yield Fault(
            "probe.ghost_batch",
            f"needs to fit twice into the {part} examples of a micro-batch, got "
            f"{ghost}; use at most {part // 2}, or larger batches",
        )


def _augment_faults(run: RunSections) -> Iterator[Fault]:
    shape = run.data.shape
    if run.augment.active and shape is not None and len(shape) != 3:
        yield Fault(
            "augment",
            "needs images of shape (channels, height, width), got examples of shape "
            f"{shape} from data.name = {run.data.name!r}; leave augment out",
        )


def _token_faults(run: RunSections) -> Iterator[Fault]:
    """Yield what takes real numbers where the data are tokens, or the reverse."""
    own = is_reference(run.model.name) or is_reference(run.data.name)
    if not own and run.model.reads_tokens != run.data.tokens:
        wanted = "tokens" if run.model.reads_tokens else "real inputs"
        yield Fault(
            "model.name",
            f"{run.model.name!r} reads {wanted}, which data.name = {run.data.name!r} "
            "does not have; use 'gpt' with 'text', and only with it",
        )
    kinds = [term.kind for term in run.training.terms]
    if run.data.tokens and "adversarial" in kinds:
        yield Fault(
            "training.terms",
            "kind = 'adversarial' changes real inputs, and data.name = "
            f"{run.data.name!r} has tokens; leave the term out",
        )


def _coupling_faults(run: RunSections) -> Iterator[Fault]:
    """Yield what a network of noisekit's own couples, on data of known shape."""
    data = run.data
    own = is_reference(run.model.name) or run.model.reads_tokens != data.tokens
    if own or data.shape is None or data.known_classes is None:
        return
    try:
        coupled = uses_batch_norm(
            run.model, input_shape=data.shape, num_classes=data.known_classes
        )
    except UsageError as error:  # a network for other examples
        yield Fault("model.name", str(error).rstrip("."))
        return
    yield from coupling_faults(run, coupled=coupled)


def coupling_faults(run: RunSections, *, coupled: bool) -> Iterator[Fault]:
    """Yield the estimators that a network with BatchNorm leaves nothing to read.

    Args:
        run: The sections of an arm.
        coupled: Whether the network has BatchNorm layers.
    """
    if not coupled:
        return
    needs = run.policy_needs & OF_READINGS - {"grad_sq_norm"}
    if needs:
        yield Fault(
            "batch_policy.name",
            f"{run.batch_policy.name!r} needs {min(needs)}, of examples with gradients "
            "of their own, which the network's BatchNorm couples; use a policy that "
            "follows the clock or the loss, or a network without BatchNorm",
        )
        return
    for name in run.probe.estimator if run.probe.every else ():
        if name in OF_EXAMPLES or name == "preconditioned":
            yield Fault(
                "probe.estimator",
                f"{name!r} needs examples with gradients of their own, which the "
                "network's BatchNorm couples; use 'ghost' with probe.ghost_batch, or "
                "'accumulation' with training.microbatch",
            )


def arm_faults(names: Sequence[str]) -> Iterator[Fault]:
    """Yield what is wrong between the arms."""
    for name, times in Counter(names).items():
        if times > 1:
            yield Fault("arms", f"needs a name per arm, got {name!r} {times} times")
    folders: dict[str, str] = {}
    for name in names:
        other = folders.setdefault(run_id_of(name, 0), name)
        if other != name:
            text = (
                f"needs names that differ in more than '/' and '=', got {other!r} and"
            )
            yield Fault("arms", f"{text} {name!r}")


def analysis_faults(names: Iterable[str]) -> Iterator[Fault]:
    """Yield the analyses that neither come with noisekit nor are the user's own."""
    known = [entry.name for entry in analyses()]
    for name in names:
        if name not in known and not is_reference(name):
            yield Fault("analyses", not_one_of("an analysis", name, known))
