"""What each update of a run does: phase, batch size, rate and optimizer settings.

The training loop asks here before each update, and so does the timeline, which trains
nothing: they cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from noisekit.policies import (
    Decision,
    Need,
    Observation,
    Scheduled,
    State,
)
from noisekit.train.data.augment import AugmentSpec
from noisekit.train.gradients import GradientRules
from noisekit.train.recipes.clock import Clock, Horizon, Position, Span
from noisekit.train.recipes.optimizers import Settings
from noisekit.train.recipes.run_spec import RunSections
from noisekit.train.recipes.scheduled_policies import ByClock

Observed = Mapping[str, Any]
"""What was observed since the last decision, by fields of ``policies.Observation``."""


@dataclass(frozen=True, slots=True)
class PlanState:
    """What a plan keeps from update to update.

    Attributes:
        phase: Phases begun.
        policy: State of the batch policy, as JSON.
    """

    phase: int
    policy: State


@dataclass(frozen=True, slots=True)
class PlannedUpdate:
    """What one update does.

    Attributes:
        before: The position that it starts at.
        begin: Place of its first example in the stream of permutations.
        after: The position after it.
        batch_size: Examples that the policy asked for; an update at the end of a
            ``ragged`` epoch has fewer.
        learning_rate: Its rate.
        base_rate: The rate without the schedule's factor.
        settings: What the optimizer's parameter groups hold beside the rate.
        microbatch: Examples per forward pass; ``None`` is the whole batch.
        rules: What fills ``.grad``.
        augment: How images are changed.
        reason: Why the policy asked for this size.
    """

    before: Position
    begin: int
    after: Position
    batch_size: int
    learning_rate: float
    base_rate: float
    settings: Settings
    microbatch: int | None
    rules: GradientRules
    augment: AugmentSpec
    reason: str

    @property
    def num_examples(self) -> int:
        """Examples of the update."""
        return self.after.examples - self.before.examples


class UpdatePlan:
    """The plan of a run: a pure function of state, position and observations."""

    def __init__(self, run: RunSections) -> None:
        clock = run.clock
        self._clock = clock
        self._phases = [_Phase(sections, clock) for sections in run.in_phases]
        self._begins = [
            [clock.span(point) for point in phase.at.clock_points.values()]
            for phase in run.phases
        ]

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the batch policies of all phases need to observe."""
        return tuple(need for phase in self._phases for need in phase.policy.needs)

    @property
    def adaptive(self) -> bool:
        """Whether a policy looks at more than the position in training."""
        return not all(isinstance(phase.policy, Scheduled) for phase in self._phases)

    @property
    def varies(self) -> bool:
        """Whether the batch size may change."""
        sizes = {size for phase in self._phases for size in phase.policy.bounds()}
        return len(sizes) > 1

    def start(self) -> PlanState:
        """Return the state before the first update."""
        return PlanState(0, self._phases[0].policy.start())

    def next(
        self,
        state: PlanState,
        position: Position,
        *,
        observed: Observed = MappingProxyType({}),
        reached: bool = False,
    ) -> tuple[PlanState, PlannedUpdate]:
        """Return what the update at ``position`` does, and the state after that.

        Args:
            state: The state so far.
            position: Where the update starts.
            observed: What was observed since the last update.
            reached: Whether the next phase's training loss, or its stall, was reached
                since the last update.
        """
        while state.phase < len(self._begins) and (
            reached or self._begun(state.phase, position)
        ):
            state, reached = self._next_phase(state), False
        phase = self._phases[state.phase]
        decision = phase.same_decision(position)
        if decision is None:
            seen = self._observation(position, observed)
            policy, decision = phase.policy.next(state.policy, seen)
            phase.decided(position, decision)
            state = PlanState(state.phase, policy)
        begin, after = self._clock.update(position, decision.batch_size)
        base_rate = phase.base_rate(decision)
        return state, PlannedUpdate(
            before=position,
            begin=begin,
            after=after,
            batch_size=decision.batch_size,
            learning_rate=base_rate * phase.factor(position),
            base_rate=base_rate,
            settings=phase.settings(decision),
            microbatch=phase.microbatch,
            rules=phase.rules,
            augment=phase.augment,
            reason=decision.reason,
        )

    def rate(self, phase: int, position: Position, like: PlannedUpdate) -> float:
        """Return the rate of an update that differs in its position alone."""
        return like.base_rate * self._phases[phase].factor(position)

    def _begun(self, phase: int, position: Position) -> bool:
        return any(span.times(position) >= 1 for span in self._begins[phase])

    def _next_phase(self, state: PlanState) -> PlanState:
        """Begin the next phase; a policy that stays keeps its state."""
        before, after = self._phases[state.phase], self._phases[state.phase + 1]
        stays = before.policy == after.policy
        return PlanState(
            state.phase + 1, state.policy if stays else after.policy.start()
        )

    def _observation(self, position: Position, observed: Observed) -> Observation:
        return Observation(
            updates=position.updates,
            examples=position.examples,
            epochs=self._clock.epochs(position),
            share=self._clock.end.share(position),
            **observed,
        )


class _Phase:
    """What holds in one phase.

    Attributes:
        policy: The batch policy.
        factor: The schedule's factor of the rate.
        microbatch: Examples per forward pass; ``None`` is the whole batch.
        rules: What fills ``.grad``.
        augment: How images are changed.
    """

    def __init__(self, run: RunSections, clock: Clock) -> None:
        self.policy = run.batch_policy.build(run.training.batch_size)
        self.microbatch = run.training.microbatch
        self.rules = GradientRules(
            run.training.terms,
            clip_norm=run.training.clip_norm,
            trust_ratio=run.optimizer.layer_scaling,
        )
        self.augment = run.augment
        self._optimizer = run.optimizer
        self._start = run.training.batch_size
        self.factor = run.schedule.factor(clock)
        self._settings: tuple[tuple[int, float], Settings] | None = None
        self._decision: Decision | None = None
        self._horizon: Horizon | None = None
        self._spans: tuple[list[Span], list[Span]] | None = None
        if isinstance(run.batch_policy, ByClock):
            places, intervals = run.batch_policy.places, run.batch_policy.intervals
            self._spans = (
                list(map(clock.span, places)),
                list(map(clock.span, intervals)),
            )

    def same_decision(self, position: Position) -> Decision | None:
        """Return the last decision, if only the clock can change it and has not."""
        if self._horizon is not None and self._horizon.covers(position):
            return self._decision
        return None

    def decided(self, position: Position, decision: Decision) -> None:
        """Keep a decision for as long as nothing but the clock could change it."""
        if self._spans is not None:
            once, repeated = self._spans
            self._horizon = Horizon.at(position, once=once, repeated=repeated)
            self._decision = decision

    def base_rate(self, decision: Decision) -> float:
        """Return the learning rate of an update, without the schedule's factor."""
        present = self._optimizer.follows == "present"
        base = self._optimizer.rate_at(decision.batch_size if present else self._start)
        return base * decision.rate_factor

    def settings(self, decision: Decision) -> Settings:
        """Return the optimizer's other settings; the same object while they stay."""
        key = (decision.batch_size, decision.beta_factor)
        if self._settings is None or self._settings[0] != key:
            found = self._optimizer.settings_at(*key)
            self._settings = (key, found)
        return self._settings[1]
