"""Every change of a run, computed before anything is trained."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from noisekit.core.references import code_allowed, is_reference
from noisekit.train.recipes.clock import Clock, Horizon, Position, Span
from noisekit.train.recipes.points import Point
from noisekit.train.recipes.recipe_errors import shown
from noisekit.train.recipes.run_spec import RunSections
from noisekit.train.recipes.scheduled_policies import ByClock
from noisekit.train.recipes.sections import multiples
from noisekit.train.recipes.update_plan import PlannedUpdate, UpdatePlan


@dataclass(frozen=True, slots=True)
class Change:
    """What holds from one update on.

    Values that only training tells are ``None``.

    Attributes:
        update: Updates before it; ``update = 0`` is the start.
        examples: Examples that entered a gradient before it.
        epoch: Passes over the training data before it.
        batch_size: Examples of an update.
        learning_rate: Rate of the first update from here on.
        momentum: Momentum of SGD, or the first beta of Adam.
        microbatch: Examples of a forward pass.
        reason: What changes.
    """

    update: int | None
    examples: int | None
    epoch: float | None
    batch_size: int | None
    learning_rate: float | None
    momentum: float | None
    microbatch: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Stretch:
    """Updates that differ in nothing but, where it changes continuously, the rate.

    Attributes:
        first: The first of them.
        count: How many there are.
        phase: Their phase.
    """

    first: PlannedUpdate
    count: int
    phase: int


def stretches(run: RunSections) -> Iterator[Stretch]:
    """Yield all updates of a run whose changes are known before training, in order.

    A stretch ends at the latest with a pass over the data. Points that only training
    reaches, such as a training loss, are taken never to be reached.

    Raises:
        UsageError: Where a batch does not fit into what is left of an epoch, under
            ``training.epoch_end = "divides"``.
    """
    clock, plan = run.clock, UpdatePlan(run)
    places, intervals = _spans(run, clock)
    state, position = plan.start(), Position()
    while not clock.ended(position):
        state, first = plan.next(state, position)
        horizon = Horizon.at(position, once=places, repeated=intervals)
        count = clock.equal_updates(position, first.batch_size, horizon)
        yield Stretch(first, count, state.phase)
        if count == 1:
            position = first.after
        else:
            position = clock.after_equal(position, first.batch_size, count)


def timeline(run: RunSections, *, each_epoch: bool = False) -> list[Change]:
    """Return every change of a run, the start first and the end last.

    A rate that changes continuously has a row where it begins to and one where it no
    longer does. Where a policy follows readings, only its first decision is known in
    advance: behind it come the points that the recipe states, without what depends on
    the policy.

    Args:
        run: The sections of a run.
        each_epoch: Whether there is a row for each pass too, as for a figure of a rate
            that changes continuously.

    Raises:
        UsageError: Where a batch does not fit into what is left of an epoch, under
            ``training.epoch_end = "divides"``.
    """
    if not known_in_advance(run):
        return _stated(run)
    changes: list[Change] = []
    before: Stretch | None = None
    for stretch in stretches(run):
        reasons = _reasons(run, before, stretch)
        position = stretch.first.before
        epoch = run.clock.epochs(position)
        if each_epoch and before and int(epoch) > run.clock.epochs(before.first.before):
            reasons = reasons or [f"epoch {int(epoch)}"]
        if reasons:
            changes.append(_change(stretch.first, epoch, "; ".join(reasons)))
        before = stretch
    if before is not None:
        changes.append(_end(run, before))
    return changes


def curve(run: RunSections, *, points: int = 256) -> list[Change]:
    """Return a run's settings densely enough to draw: lines go from row to row.

    Where a setting jumps there are two rows at one place, before and after. A run whose
    policy follows readings has its first decision alone.

    Args:
        run: The sections of a run.
        points: Rows, about, over which a rate that changes continuously is spread.
    """
    if not known_in_advance(run):
        return [_first(run)]
    clock, plan = run.clock, UpdatePlan(run)
    step = max(1, run.max_updates // points)
    rows: list[Change] = []
    for stretch in stretches(run):
        first, size = stretch.first, stretch.first.batch_size
        smooth = _is_smooth(run, stretch)
        inside = (*range(0, stretch.count, step), stretch.count - 1)
        for offset in sorted(set(inside)) if smooth else (0,):
            position = first.before
            if offset:
                position = clock.after_equal(position, size, offset)
            row = replace(
                _change(first, clock.epochs(position), ""),
                update=position.updates,
                examples=position.examples,
                learning_rate=plan.rate(stretch.phase, position, first),
            )
            _append(rows, row, gap=step if smooth else 0)
        end = replace(_end(run, stretch), reason="")
        if not smooth or end.update == run.max_updates:
            _append(rows, end)
    return rows


def _is_smooth(run: RunSections, stretch: Stretch) -> bool:
    """Whether the rate changes from update to update."""
    schedule = run.in_phases[stretch.phase].schedule
    warmup = schedule.warmup
    warming = (
        warmup is not None
        and run.clock.span(warmup.length).times(stretch.first.before) == 0
    )
    return schedule.smooth or warming


def _append(rows: list[Change], row: Change, *, gap: int = 0) -> None:
    """Add a row; in place of the last one where that is not needed for a line.

    Args:
        rows: The rows so far.
        row: The next one.
        gap: Updates within which a rate may change without a row of its own.
    """
    if len(rows) > 1:
        before, last = rows[-2], rows[-1]
        same = _settings(before) == _settings(last) == _settings(row)
        near = (row.update or 0) - (before.update or 0) < gap
        flat = before.learning_rate == last.learning_rate == row.learning_rate
        if same and (flat or near):
            rows[-1] = row
            return
    rows.append(row)


def _settings(row: Change) -> tuple[object, ...]:
    """Return what holds beside the rate."""
    return row.batch_size, row.momentum, row.microbatch


def updates_by_batch(run: RunSections) -> dict[int, int]:
    """Return how many updates of each batch size the longest run has.

    Where a policy follows readings: as many as fit if all are of its smallest size.
    """
    if not known_in_advance(run):
        sizes = (s.batch_policy.smallest(s.training.batch_size) for s in run.in_phases)
        return {min(sizes): run.max_updates}
    counts: dict[int, int] = {}
    for stretch in stretches(run):
        size = stretch.first.num_examples
        counts[size] = counts.get(size, 0) + stretch.count
    return counts


def most_examples(run: RunSections) -> int:
    """Return how many examples enter a gradient in the longest run, at most."""
    if known_in_advance(run):
        counts = updates_by_batch(run)
        return sum(size * count for size, count in counts.items())
    bounds = (
        part.batch_policy.build(part.training.batch_size).bounds()
        for part in run.in_phases
    )
    largest = max(high for _, high in bounds)
    # The last update may begin one example before the end of the last epoch.
    return int(min(run.clock.end.cursor + largest, run.max_updates * largest))


def known_in_advance(run: RunSections) -> bool:
    """Whether all batch sizes follow from the position in training."""
    return all(isinstance(part.batch_policy, ByClock) for part in run.in_phases)


def _spans(run: RunSections, clock: Clock) -> tuple[list[Span], list[Span]]:
    """Return where changes are stated, and the distances of repeated ones."""
    places = [p for phase in run.phases for p in phase.at.clock_points.values()]
    intervals: list[Point] = []
    for part in run.in_phases:
        places += part.schedule.places
        intervals += part.schedule.intervals
        if isinstance(part.batch_policy, ByClock):
            places += part.batch_policy.places
            intervals += part.batch_policy.intervals
    spans = list(map(clock.span, places))
    return [*spans, clock.end], list(map(clock.span, intervals))


def _reasons(run: RunSections, before: Stretch | None, now: Stretch) -> list[str]:
    """Return what changes at a stretch, in words."""
    if before is None:
        return ["start"]
    old, new = before.first, now.first
    part, clock = run.in_phases[now.phase], run.clock
    reasons = [_phase(run, number) for number in range(before.phase, now.phase)]
    same = (old.batch_size, old.base_rate) == (new.batch_size, new.base_rate)
    if not same and not reasons:
        reasons.append(f"{part.batch_policy.name}: {new.reason}")
    warmup = part.schedule.warmup
    if warmup is not None and clock.span(warmup.length).reached(old.before, new.before):
        reasons.append("end of the warm-up")
    decay = part.schedule.decay(clock)
    factors = decay(old.before), decay(new.before)
    if not part.schedule.smooth and factors[0] != factors[1]:
        ratio = factors[1] / factors[0]
        reasons.append(f"{part.schedule.name}: the rate is multiplied by {ratio:.6g}")
    return reasons


def _phase(run: RunSections, number: int) -> str:
    settings = run.phases[number].set.items()
    listed = ", ".join(f"{key} = {shown(value)}" for key, value in settings)
    return f"phase {number + 1}: {listed}"


def _change(update: PlannedUpdate, epoch: float, reason: str) -> Change:
    return Change(
        update=update.before.updates,
        examples=update.before.examples,
        epoch=epoch,
        batch_size=update.batch_size,
        learning_rate=update.learning_rate,
        momentum=_momentum(update.settings),
        microbatch=min(update.microbatch or update.batch_size, update.batch_size),
        reason=reason,
    )


def _end(run: RunSections, last: Stretch) -> Change:
    """Return the end of a run: what its last update was."""
    clock, first = run.clock, last.first
    position, after = first.before, first.after
    if last.count > 1:
        size = first.batch_size
        position = clock.after_equal(position, size, last.count - 1)
        _, after = clock.update(position, size)
    plan = UpdatePlan(run)
    rate = plan.rate(last.phase, position, first)
    row = _change(first, clock.epochs(after), "end of the longest run")
    return replace(
        row, update=after.updates, examples=after.examples, learning_rate=rate
    )


def _momentum(settings: Mapping[str, Any]) -> float | None:
    """Return SGD's momentum, or the first of Adam's betas."""
    betas = settings.get("betas")
    value = settings.get("momentum", betas[0] if betas else None)
    return None if value is None else float(value)


def _stated(run: RunSections) -> list[Change]:
    """Return the points that a recipe states, whatever a policy decides."""
    clock, rows = run.clock, [_first(run)]
    for part in run.in_phases:
        schedule = part.schedule
        found = [(point, f"{schedule.name}: a milestone") for point in schedule.places]
        if schedule.warmup is not None:
            found[0] = (schedule.warmup.length, "end of the warm-up")
        for interval in schedule.intervals:
            found += [
                (point, f"{schedule.name}: a milestone")
                for _, point in multiples("", interval, run.training.stop)
            ]
        rows += [_at_point(clock, point, text) for point, text in found]
    for number, phase in enumerate(run.phases):
        points = phase.at.clock_points.values()
        rows += [_at_point(clock, point, _phase(run, number)) for point in points]
    rows += [
        _at_point(clock, point, "end of the longest run")
        for point in run.training.stop.clock_points.values()
    ]
    return sorted(dict.fromkeys(rows), key=partial(_order, clock))


def _first(run: RunSections) -> Change:
    """Return the first decision of a policy that follows readings."""
    policy = run.batch_policy
    text = f"{policy.name}: batch size and rate follow the readings from here on"
    if is_reference(policy.name) and not code_allowed():
        return Change(0, 0, 0.0, None, None, None, run.training.microbatch, text)
    plan = UpdatePlan(run)
    _, update = plan.next(plan.start(), Position())
    low, high = policy.build(run.training.batch_size).bounds()
    return _change(update, 0.0, f"{text}, between {low} and {high} examples")


def _at_point(clock: Clock, point: Point, reason: str) -> Change:
    """Return a row of which the point alone is known."""
    span = clock.span(point)
    known = math.isfinite(span.cursor) and math.isinf(span.updates)
    return Change(
        update=None if math.isinf(span.updates) else math.ceil(span.updates),
        examples=None,
        epoch=span.cursor / clock.num_examples if known else None,
        batch_size=None,
        learning_rate=None,
        momentum=None,
        microbatch=None,
        reason=reason,
    )


def _order(clock: Clock, row: Change) -> float:
    """Return how far through the longest run a row is."""
    return max(
        (row.update or 0) / clock.end.updates,
        (row.epoch or 0.0) * clock.num_examples / clock.end.cursor,
    )
