"""Everything that a resume needs, in one object."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from noisekit.core.errors import CheckpointError
from noisekit.core.params import flatten
from noisekit.core.randomness import stream_seed
from noisekit.probes import Probe
from noisekit.train.recipes.clock import Position
from noisekit.train.recipes.points import Point
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.update_plan import PlanState
from noisekit.train.runs.crossings import LossCrossing, StallWatch

Row = dict[str, bool | int | float | str | None]

STOP = "/stop"
"""Stands for ``training.stop`` among snapshots, whose names have no slash."""

PHASE = "/phase"
"""Stands for the point of the next phase among snapshots."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Weights kept at a crossing that is not yet sustained.

    Attributes:
        row: Their row of the snapshots table.
        weights: The model's state, copied.
        optimizer: The optimizer's state, copied, where another run goes on with it.
    """

    row: Row
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None  # PyTorch's own structure


@dataclass(slots=True)
class TrainState:
    """All that changes while a run trains.

    Batches, learning rate and epoch follow from the position and the seed alone, so
    they have no state of their own.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        position: How far training is.
        seconds: Wall time spent training, over all processes [s].
        ended: Why training is over; empty while it goes on.
        diverged: Whether it ended since a loss was not finite.
        plan: What decides the next update, beside the position.
        observed: What the batch policy is told at the next update, as JSON.
        crossings: Crossings of training losses, by snapshot, ``STOP`` or ``PHASE``.
        stalls: Watches for a stalled training loss, by the same names.
        candidates: Weights kept at crossings that may yet be undone.
        taken: Names of the snapshots taken.
        num_rows: Rows of each table that belong to this state.
        kept_optimizers: Snapshots that the optimizer's state is kept at.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position = field(default_factory=Position)
    seconds: float = 0.0
    ended: str = ""
    diverged: bool = False
    plan: PlanState = PlanState(0, {})  # noqa: RUF009  frozen
    observed: dict[str, Any] = field(default_factory=dict)
    crossings: dict[str, LossCrossing] = field(default_factory=dict)
    stalls: dict[str, StallWatch] = field(default_factory=dict)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    num_rows: dict[str, int] = field(default_factory=dict)
    kept_optimizers: frozenset[str] = frozenset()

    @classmethod
    def start(cls, spec: RunSpec, model: nn.Module) -> "TrainState":
        """Return the state before the first update, with global randomness seeded."""
        torch.manual_seed(stream_seed(spec.seed, "training"))
        state = cls(
            model=model,
            optimizer=spec.optimizer.build(model.parameters()),
            kept_optimizers=frozenset(spec.kept_optimizers),
        )
        for name, point in {**spec.snapshot_points, STOP: spec.training.stop}.items():
            state.watch(name, point)
        if spec.phases:
            state.watch(PHASE, spec.phases[0].at)
        return state

    def watch(self, name: str, point: Point | None) -> None:
        """Watch for the training loss, or the stall, of a point from now on."""
        self.crossings.pop(name, None)
        self.stalls.pop(name, None)
        if point is not None and point.loss is not None:
            self.crossings[name] = LossCrossing(point.loss, point.sustain)
        if point is not None and point.stalled is not None:
            self.stalls[name] = StallWatch.of(point.stalled)

    @property
    def phase_reached(self) -> bool:
        """Whether the training loss, or a stall, has begun the next phase."""
        crossing, stall = self.crossings.get(PHASE), self.stalls.get(PHASE)
        return bool((crossing and crossing.passed) or (stall and stall.stalled))

    def costs(self) -> dict[str, float]:
        """Return what training took so far."""
        return {
            "updates": float(self.position.updates),
            "examples_seen": float(self.position.examples),
            "train_seconds": self.seconds,
        }

    def vector(self) -> Tensor:
        """Return the parameters as one vector; a copy."""
        return flatten(p.detach() for p in self.model.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the model's parameters and buffers."""
        state = self.model.state_dict()
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def optimizer_kept_at(self, snapshot: str) -> dict[str, Any] | None:
        """Return a copy of the optimizer's state, if it is kept at a snapshot.

        Buffers and step counts, without the settings, which are each run's own.
        """
        if snapshot not in self.kept_optimizers:
            return None
        return {"state": deepcopy(self.optimizer.state_dict()["state"])}


@dataclass(frozen=True, slots=True)
class Captured:
    """A state as tensors and JSON, as it lies in a checkpoint.

    Attributes:
        step: Updates taken.
        tensors: All tensors, by path.
        values: Everything else.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]  # JSON that this module wrote

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each table that belong to it."""
        return dict(self.values["num_rows"])

    @property
    def ended(self) -> bool:
        """Whether training is over."""
        return bool(self.values["ended"])


def capture(state: TrainState, probe: Probe | None) -> Captured:
    """Return the whole state, global randomness included."""
    tensors: dict[str, Tensor] = {}
    values = {
        "position": asdict(state.position),
        "seconds": state.seconds,
        "ended": state.ended,
        "diverged": state.diverged,
        "phase": state.plan.phase,
        "policy_state": dict(state.plan.policy),
        "observed": dict(state.observed),
        "crossings": {name: asdict(item) for name, item in state.crossings.items()},
        "stalls": {name: asdict(item) for name, item in state.stalls.items()},
        "taken": list(state.taken),
        "num_rows": dict(state.num_rows),
        "candidates": {name: item.row for name, item in state.candidates.items()},
        "optimizer": _detach(state.optimizer.state_dict(), "optimizer", tensors),
        "candidate_optimizers": {
            name: _detach(item.optimizer, f"candidate-optimizer/{name}", tensors)
            for name, item in state.candidates.items()
            if item.optimizer is not None
        },
        "probe": probe.state_dict() if probe else None,
    }
    for name, tensor in state.model.state_dict().items():
        tensors[f"model/{name}"] = tensor.detach()
    for candidate, item in state.candidates.items():
        for name, tensor in item.weights.items():
            tensors[f"candidate/{candidate}/{name}"] = tensor
    tensors["random/cpu"] = torch.get_rng_state()
    device = next(state.model.parameters()).device
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    return Captured(state.position.updates, tensors, values)


def restore(state: TrainState, probe: Probe | None, captured: Captured) -> None:
    """Bring ``state``, as it is at the start of its run, to what was captured.

    Raises:
        CheckpointError: If it was captured from another model or optimizer.
    """
    tensors, values = captured.tensors, captured.values
    try:
        state.model.load_state_dict(_below(tensors, "model"))
        state.optimizer.load_state_dict(attach(values["optimizer"], tensors))
        if probe is not None and values["probe"] is not None:
            probe.load_state_dict(values["probe"])
        _restore_values(state, tensors, values)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint of update {captured.step} needs to fit the run's model, "
            f"optimizer and recipe, got {type(error).__name__}: {error}; delete the "
            "run's directory and resume to run it again."
        ) from error
    torch.set_rng_state(tensors["random/cpu"])
    device = next(state.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)


# The values come from JSON that this module wrote and that a checksum covers.
def _restore_values(
    state: TrainState, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    state.position = Position(**values["position"])
    state.seconds = float(values["seconds"])
    state.ended = str(values["ended"])
    state.diverged = bool(values["diverged"])
    # A checkpoint of before there were phases and policies has neither.
    state.plan = PlanState(values.get("phase", 0), values.get("policy_state", {}))
    state.observed = dict(values.get("observed", {}))
    state.taken = list(values["taken"])
    state.num_rows = dict(values["num_rows"])
    state.crossings = {
        name: LossCrossing(**item) for name, item in values["crossings"].items()
    }
    state.stalls = {name: StallWatch(**item) for name, item in values["stalls"].items()}
    optimizers = {
        name: attach(item, tensors)
        for name, item in values.get("candidate_optimizers", {}).items()
    }
    state.candidates = {
        name: Candidate(row, _below(tensors, f"candidate/{name}"), optimizers.get(name))
        for name, row in values["candidates"].items()
    }


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    cut = len(prefix) + 1
    return {
        name[cut:]: tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}/")
    }


def detach(value: object) -> tuple[dict[str, Tensor], object]:
    """Return the tensors of a nested state by their paths, and all else as JSON."""
    tensors: dict[str, Tensor] = {}
    values = _detach(value, "", tensors)
    return tensors, values


_TENSOR = "__tensor__"


def _detach(value: object, path: str, tensors: dict[str, Tensor]) -> object:
    """Return ``value`` as JSON can hold it, with its tensors moved to ``tensors``."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        # Pairs, since an optimizer's keys are integers and JSON's are not.
        return {
            "__pairs__": [
                [key, _detach(item, f"{path}/{key}", tensors)]
                for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        return [_detach(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def attach(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo ``detach``."""
    if isinstance(value, list):
        return [attach(item, tensors) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: attach(item, tensors) for key, item in value["__pairs__"]}
    return value
