"""What drives a policy in somebody's loop: readings in, decisions out, on all ranks."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from noisekit.core.distributed import Ranks, sum_over_ranks
from noisekit.core.errors import CheckpointError, PolicyWarning, UsageError
from noisekit.policies.point import At
from noisekit.policies.policy import Decision, Observation, Policy, State
from noisekit.policies.readings import ReadingSource, values_of_reading
from noisekit.policies.stream import Place

Values = Mapping[str, float | None]

_POSITION = {"updates", "examples", "epochs", "share", "batch_size", "others"}
_FIELDS = {item.name for item in fields(Observation)}


@dataclass(frozen=True, slots=True)
class DriverState:
    """What a decision changes; frozen, so that one can be taken back.

    Attributes:
        policy: State of the policy.
        decision: The last one, as fitted to data and processes.
        readings: What was observed and not yet seen by the policy, oldest first.
    """

    policy: State
    decision: Decision
    readings: tuple[Values, ...] = ()


class PolicyDriver:
    """A policy at work.

    Attributes:
        policy: The policy.
        state: What a resume needs.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_examples: int,
        multiple: int,
        ranks: Ranks,
        length: At | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        if optimizer is not None:
            policy.check_optimizer(optimizer)
        self.policy = policy
        self._ranks, self._length, self._optimizer = ranks, length, optimizer
        self._num_examples, self._multiple = num_examples, multiple
        self._given: set[str] = set()
        self._has_warned = False
        self.state = DriverState(policy.start(), Decision(0))

    # ------------------------------------------------------------------ decisions

    def decide(self, place: Place, *, waits: bool) -> Decision:
        """Ask the policy about the update that begins at a place.

        Args:
            place: Where it begins.
            waits: Whether updates are under way whose readings are still to come. A
                policy that needs readings is then not asked without one.
        """
        readings, state = self.state.readings, self.state
        asked = bool(readings) or not (waits and self.policy.needs)
        if not asked and state.decision.batch_size:
            return state.decision
        position = self._position(place)
        for values in readings or ({},):
            new, decision = self.policy.next(state.policy, _seen(position, values))
            state = DriverState(new, self._fitted(decision))
        self.state = state
        return state.decision

    def _position(self, place: Place) -> Observation:
        position = Observation(
            updates=place.updates,
            examples=place.examples,
            epochs=place.cursor / self._num_examples,
        )
        if self._length is None:
            return position
        share = self._length.now(position) / self._length.amount
        return replace(position, share=min(1.0, share))

    def _fitted(self, decision: Decision) -> Decision:
        """Round up to what processes and micro-batches can share; at most all data."""
        most = min(self.policy.bounds()[1], self._num_examples)
        size = math.ceil(min(decision.batch_size, most) / self._multiple)
        size = max(1, min(size, most // self._multiple)) * self._multiple
        return replace(decision, batch_size=size)

    # ------------------------------------------------------------------- readings

    def observe(
        self,
        source: ReadingSource | None,
        values: Mapping[str, float | Tensor | None],
        *,
        batch_size: int,
    ) -> None:
        """Keep what was seen of an update for the next decision.

        Args:
            source: A probe.
            values: Numbers by name.
            batch_size: Examples of the update.

        Raises:
            UsageError: If a name is neither a value of observations nor needed.
        """
        names = tuple(need.name for need in self.policy.needs)
        for name in values:
            if name in _POSITION or (name not in _FIELDS and name not in names):
                raise UsageError(
                    f"observe() knows no value {name!r}; this policy needs "
                    f"{', '.join(names) or 'none'}."
                )
        if not names:
            return
        found = {name: _number(value) for name, value in values.items()}
        rate = found.get("learning_rate", self._learning_rate())
        if rate is not None:
            found["learning_rate"] = rate
        own = self._averaged(found, names, read=source is not None)
        if source is not None:
            read = values_of_reading(
                source,
                [name for name in names if name not in own],
                loss=own.get("loss"),
                learning_rate=own.get("learning_rate"),
            )
            own |= read
        self._note_missing(names, own)
        # NaN is no JSON; a missing value and one that is not finite mean the same.
        kept = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in own.items()
        }
        reading = {**kept, "batch_size": batch_size}
        self.state = replace(self.state, readings=(*self.state.readings, reading))

    def _learning_rate(self) -> float | None:
        """The optimizer's rate, where all its groups have the same."""
        if self._optimizer is None:
            return None
        rates = {float(group["lr"]) for group in self._optimizer.param_groups}
        return rates.pop() if len(rates) == 1 else None

    def _averaged(
        self, found: Mapping[str, float], names: tuple[str, ...], *, read: bool
    ) -> dict[str, float]:
        """Average numbers over processes, one all-reduce for the needed ones."""
        own = {name: value for name, value in found.items() if name in names}
        if self._ranks.alone or (read and not own):
            return own
        nothing = math.nan  # one process without a number leaves all without
        group = self._ranks.group
        on_gpu = dist.get_backend(group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        row = torch.tensor(
            [own.get(name, nothing) for name in names],
            dtype=torch.float64,
            device=device,
        )
        means = (sum_over_ranks(row, self._ranks) / self._ranks.size).tolist()
        pairs = zip(names, means, strict=True)
        return {name: mean for name, mean in pairs if name in own}

    def _note_missing(self, names: tuple[str, ...], own: Mapping[str, float]) -> None:
        """Warn once of a value that the policy needs and was never given."""
        self._given.update(own)
        missing = [name for name in names if name not in self._given]
        if missing and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{type(self.policy).__name__} needs {', '.join(missing)}, which "
                "observe() was not given: the batch size stays as it is until it is. "
                "Pass a probe, the numbers by name, or optimizer= for the rate.",
                PolicyWarning,
                stacklevel=4,
            )

    # ----------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "name": self.policy.name,
            "policy": dict(self.state.policy),
            "decision": asdict(self.state.decision),
            "readings": [dict(values) for values in self.state.readings],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: If it is that of another policy.
        """
        if saved["name"] != self.policy.name:
            raise CheckpointError(
                f"the state of a sampler with policy {self.policy.name!r} is needed, "
                f"got one of {saved['name']!r}; build the sampler with that policy."
            )
        self.state = DriverState(
            saved["policy"],
            Decision(**saved["decision"]),
            tuple(saved["readings"]),
        )


def _number(value: float | Tensor | None) -> float:
    if value is None:
        return math.nan
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _seen(position: Observation, values: Values) -> Observation:
    """The position with the values of the last update."""
    known: dict[str, Any] = {k: v for k, v in values.items() if k in _FIELDS}
    others = {
        name: math.nan if value is None else value
        for name, value in values.items()
        if name not in _FIELDS
    }
    return replace(position, **known, others=others)
