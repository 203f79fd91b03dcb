"""Checkpoints: one file each, whole or absent, verified when read."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from noisekit.core.errors import CheckpointError, RunDirectoryError
from noisekit.records import load_tensors, save_tensors
from noisekit.records.files import sync_directory
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.state import Captured

_FILE = re.compile(r"update-(\d{9})\.safetensors")
# How the work is spread over a machine, and how often it is saved, change no bit.
_NO_BITS = {"compute": {"workers", "checkpoint_updates", "keep_checkpoints"}}


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that can be used.

    Attributes:
        captured: Its content; ``None`` where there is no checkpoint to go on from.
        faults: Newer ones that cannot be used, and why.
    """

    captured: Captured | None
    faults: tuple[str, ...]


def fingerprint(spec: RunSpec) -> str:
    """Return a hash of everything in ``spec`` that decides the run's bits."""
    content = spec.model_dump(mode="json", exclude=_NO_BITS)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    directory: Path, captured: Captured, *, spec: RunSpec, threads: int
) -> Path:
    """Write a checkpoint, durably, then remove the oldest beyond those to keep.

    Rows that belong to it must be durable before.
    """
    path = directory / f"update-{captured.step:09d}.safetensors"
    arrays = {name: t.detach().cpu().numpy() for name, t in captured.tensors.items()}
    save_tensors(
        path,
        arrays,
        {
            "values": json.dumps(captured.values),
            "fingerprint": fingerprint(spec),
            "threads": str(threads),
        },
    )
    for old in _newest_first(directory)[spec.compute.keep_checkpoints :]:
        old.unlink()
    return path


def load_checkpoint(
    directory: Path,
    *,
    spec: RunSpec,
    threads: int,
    usable: Callable[[Captured], bool] = lambda captured: True,
) -> Found:
    """Return the newest checkpoint that is whole, and what is wrong with newer ones.

    Args:
        directory: Where the checkpoints are.
        spec: The run that is to go on.
        threads: Threads that it would go on with.
        usable: Whether the run's tables still have the rows of a checkpoint.

    Raises:
        CheckpointError: If checkpoints are there and none can be used, or if one is
            of another recipe or number of threads.
    """
    faults: list[str] = []
    paths = _newest_first(directory)
    for path in paths:
        try:
            captured = _read(path, spec, threads)
        except CheckpointError:
            raise
        except (RunDirectoryError, KeyError, ValueError) as error:
            faults.append(f"checkpoint {path.name} was left out: {error}")
            continue
        if usable(captured):
            return Found(captured, tuple(faults))
        faults.append(
            f"checkpoint {path.name} was left out: its rows are not all there"
        )
    if paths:
        raise CheckpointError(
            f"resuming needs one whole checkpoint in {directory}, got "
            f"{len(paths)} damaged ({'; '.join(faults)}); delete the run's directory "
            "and resume to run it again from the start."
        )
    return Found(None, ())


def remove_checkpoints(directory: Path) -> None:
    """Remove all checkpoints of a run that is complete."""
    if directory.exists():
        for path in _newest_first(directory):
            path.unlink()
        sync_directory(directory)


def _read(path: Path, spec: RunSpec, threads: int) -> Captured:
    arrays, metadata = load_tensors(path, ours=True)
    values = json.loads(metadata["values"])
    if metadata["fingerprint"] != fingerprint(spec):
        raise CheckpointError(
            f"{path} needs to be of this recipe, got one of other settings; restore "
            "the recipe, or run it into a new directory."
        )
    if int(metadata["threads"]) != threads:
        raise CheckpointError(
            f"{path} needs {metadata['threads']} threads to go on with the same bits, "
            f"got {threads}; set compute.threads = {metadata['threads']} and leave "
            "OMP_NUM_THREADS alone."
        )
    # Copied, since the arrays are views of bytes that nobody may write to.
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    return Captured(int(values["position"]["updates"]), tensors, values)


def _newest_first(directory: Path) -> list[Path]:
    return sorted(
        (path for path in directory.glob("*") if _FILE.fullmatch(path.name)),
        reverse=True,
    )
