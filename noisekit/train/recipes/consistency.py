"""What a recipe's sections need of each other, beyond each one's own types."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from noisekit.core.vocabulary import QUANTITIES
from noisekit.train.recipes.measure_spec import ALWAYS_RECORDED, MeasureSpec
from noisekit.train.recipes.probe_spec import OF_EXAMPLES
from noisekit.train.recipes.recipe_errors import Fault, not_one_of
from noisekit.train.recipes.run_spec import (
    RunSections,
    SnapshotSpec,
)


def run_faults(run: RunSections) -> Iterator[Fault]:
    """Yield what is wrong between data, training, snapshots and measure of one arm."""
    yield from _batch_faults(run)
    yield from _snapshot_faults(run)
    wanted, there = run.measure.num_examples, run.data.train
    if wanted is not None and wanted > there:
        yield Fault(
            "measure.num_examples",
            f"needs at most data.train ({there}) examples, got {wanted}",
        )


def _batch_faults(run: RunSections) -> Iterator[Fault]:
    batch, there = run.training.batch_size, run.data.train
    key = "training.batch_size"
    if batch > there:
        yield Fault(key, f"needs at most data.train ({there}) examples, got {batch}")
        return
    whole, rest = divmod(there, batch)
    if rest and not (run.training.drop_last or run.training.allow_ragged):
        yield Fault(
            key,
            f"needs to divide data.train ({there}), so that every update sees as many "
            f"examples; with {batch}, batch {whole + 1} of each epoch would have "
            f"{rest}. Choose another number, or set training.drop_last or "
            "training.allow_ragged",
        )


def estimator_faults(run: RunSections) -> Iterator[Fault]:
    """Yield which estimators of gradient noise could never be read, and why."""
    if run.probe.every == 0:
        return
    names, training = run.probe.estimator, run.training
    key = "probe.estimator"
    if "accumulation" in names and training.accumulation < 2:
        yield Fault(
            key,
            "'accumulation' compares the micro-batches of an update, so that it needs "
            f"training.accumulation of 2 or more, got {training.accumulation}; raise "
            "it, or use 'auto'",
        )
    coupled = run.model.name == "f1" or run.model.norm == "batch"
    for name in names if coupled else ():
        if name in OF_EXAMPLES or name == "preconditioned":
            yield Fault(
                key,
                f"{name!r} needs examples with gradients of their own, which the "
                "network's BatchNorm couples; use 'ghost' with probe.ghost_batch, or "
                "'accumulation' with training.accumulation",
            )
    if "preconditioned" in names and run.optimizer.name == "sgd":
        yield Fault(
            key,
            "'preconditioned' is the noise that Adam sees, and needs optimizer.name = "
            "'adam' or 'adamw', got 'sgd'; leave it out",
        )
    ghost, part = run.probe.ghost_batch, training.batch_size // training.accumulation
    if ghost is not None and 2 * ghost > part:
        yield Fault(
            "probe.ghost_batch",
            f"needs to fit twice into the {part} examples of a micro-batch, got "
            f"{ghost}; use at most {part // 2}, or larger batches",
        )


def _snapshot_faults(run: RunSections) -> Iterator[Fault]:
    last = run.max_updates
    planned = {
        f"snapshots.epochs.{name}": run.updates_at(epochs)
        for name, epochs in run.snapshots.epochs.items()
    } | {f"snapshots.updates.{name}": n for name, n in run.snapshots.updates.items()}
    for key, update in planned.items():
        if update > last:
            yield Fault(
                key,
                f"lies at update {update}, after the last that training.stop allows "
                f"({last}); take it earlier or train longer",
            )
    for name in run.measure.at:
        if name not in run.snapshots.names:
            text = not_one_of("a snapshot", name, run.snapshots.names)
            yield Fault(f"measure.at.{name}", text)


def arm_faults(names: Sequence[str]) -> Iterator[Fault]:
    """Yield what is wrong between the arms."""
    for name, times in Counter(names).items():
        if times > 1:
            yield Fault("arms", f"needs a name per arm, got {name!r} {times} times")


def contrast_faults(
    contrast: Mapping[str, str],
    arms: Iterable[str],
    snapshots: SnapshotSpec,
    measure: MeasureSpec,
) -> Iterator[tuple[str, str]]:
    """Yield key and text of each name in a contrast that nothing answers to."""
    arms = list(arms)
    for role in ("treatment", "reference"):
        if contrast[role] not in arms:
            yield role, not_one_of("an arm", contrast[role], arms)
    if contrast["treatment"] == contrast["reference"]:
        yield "reference", f"needs another arm than the treatment, {contrast[role]!r}"
    snapshot, quantity = contrast["snapshot"], contrast["quantity"]
    if snapshot not in snapshots.names:
        yield "snapshot", not_one_of("a snapshot", snapshot, snapshots.names)
        return
    there = (*ALWAYS_RECORDED, *measure.measures_at(snapshot))
    if quantity not in QUANTITIES:
        yield "quantity", not_one_of("a quantity", quantity, there)
    elif quantity not in there:
        yield (
            "quantity",
            f"{quantity!r} is not measured at {snapshot!r}; add it to "
            f"measure.at.{snapshot} or to measure.everywhere",
        )
