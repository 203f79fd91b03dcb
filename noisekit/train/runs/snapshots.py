"""Which weights of a run are kept, and how they lie on disk."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noisekit.records import RunDirectory, load_tensors, save_tensors
from noisekit.train.runs.evaluate import Evaluation
from noisekit.train.runs.state import (
    PHASE,
    STOP,
    Candidate,
    Row,
    TrainState,
    attach,
    detach,
)


def crossed_snapshots(
    state: TrainState,
    position: Row,
    train_loss: float,
    evaluation: Callable[[], Evaluation],
) -> list[tuple[str, Candidate]]:
    """Bring the crossings up to a regular evaluation; return those now sustained.

    What is returned are the weights at the first evaluation of each crossing.

    Args:
        state: Has the crossings.
        position: Where training is.
        train_loss: Training loss there.
        evaluation: Returns the evaluation on all parts of the data there.
    """
    sustained: list[tuple[str, Candidate]] = []
    for name, crossing in state.crossings.items():
        if name in {STOP, PHASE} or name in state.taken:
            continue
        state.crossings[name], meaning = crossing.after(train_loss)
        if meaning == "above":
            state.candidates.pop(name, None)
        if meaning in {"candidate", "sustained"} and name not in state.candidates:
            state.candidates[name] = candidate(
                state, position, evaluation(), name=name, kind="loss"
            )
        if meaning == "sustained":
            sustained.append((name, state.candidates.pop(name)))
    return sustained


def candidate(
    state: TrainState, position: Row, evaluation: Evaluation, *, name: str, kind: str
) -> Candidate:
    """Return the present weights with their row of the snapshots table."""
    row: Row = {"snapshot": name, "kind": kind, **position, **evaluation.scores}
    return Candidate(row, state.weights(), state.optimizer_kept_at(name))


def save_weights(
    directory: Path, name: str, weights: Mapping[str, Tensor], facts: Mapping[str, str]
) -> None:
    """Write a snapshot's weights as safetensors, durably and at once."""
    arrays = {key: tensor.detach().cpu().numpy() for key, tensor in weights.items()}
    save_tensors(directory / f"{name}.safetensors", arrays, facts)


def save_optimizer(
    directory: Path,
    name: str,
    optimizer: Mapping[str, object],
    facts: Mapping[str, str],
) -> None:
    """Write the state of the optimizer at a snapshot, durably and at once."""
    tensors, values = detach(optimizer)
    arrays = {key: tensor.cpu().numpy() for key, tensor in tensors.items()}
    facts = {**facts, "values": json.dumps(values)}
    save_tensors(directory / f"{name}.safetensors", arrays, facts)


def load_optimizer(path: Path) -> dict[str, Any]:
    """Return the state of an optimizer that ``save_optimizer`` wrote, on the CPU."""
    arrays, facts = load_tensors(path, ours=True)
    tensors = {key: torch.tensor(array) for key, array in arrays.items()}
    state: dict[str, Any] = attach(json.loads(facts["values"]), tensors)
    return state


def load_weights(run: RunDirectory, name: str) -> dict[str, Tensor]:
    """Return a snapshot's weights as a state dictionary, on the CPU."""
    arrays = run.load_snapshot(name)
    return {key: torch.tensor(array) for key, array in arrays.items()}
