"""Where a run begins: at the weights of its seed, or at another run's snapshot."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from noisekit.core.errors import RunDirectoryError
from noisekit.records import RunDirectory
from noisekit.records.tensors import stated_checksum
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.snapshots import load_optimizer, load_weights
from noisekit.train.runs.state import TrainState
from noisekit.train.section import run_id_of


@dataclass(frozen=True, slots=True)
class Origin:
    """A snapshot of another run.

    Attributes:
        run: The run.
        snapshot: Name of the snapshot.
        step: The update of its run that it was taken after; ``None`` where that run
            ended without taking it.
    """

    run: RunDirectory
    snapshot: str
    step: int | None

    @property
    def weights(self) -> Path:
        """File of the weights and buffers."""
        return self.run.snapshots / f"{self.snapshot}.safetensors"

    @property
    def optimizer(self) -> Path:
        """File of the optimizer's state."""
        return self.run.optimizers / f"{self.snapshot}.safetensors"

    @property
    def missing(self) -> str:
        """Why there is nothing to start from; empty where there is."""
        if self.step is not None:
            return ""
        manifest = self.run.manifest
        return (
            f"{manifest.run_id} ended without snapshot {self.snapshot!r} "
            f"({manifest.status}: {manifest.reason})"
        )


def find_origin(spec: RunSpec, run: RunDirectory) -> Origin | None:
    """Return what a run begins with; ``None`` for the weights of its seed.

    The other run has to be complete: from then on its files have digests.

    Args:
        spec: The run.
        run: Its directory, beside that of the other run.

    Raises:
        RunDirectoryError: If the other run is not there or not complete.
    """
    if spec.start is None:
        return None
    name, snapshot = run_id_of(spec.start.arm, spec.seed), spec.start.snapshot
    other = RunDirectory.open(run.path.parent / name, run_id=name)
    if not other.manifest.status.complete:
        raise RunDirectoryError(
            f"run {spec.run_id} starts from {snapshot!r} of run {name}, which needs to "
            f"be complete, got one that is {other.manifest.status}; execute that one "
            "first, as `noisekit run` and `noisekit resume` do."
        )
    taken = other.read("snapshots", columns=["snapshot", "step"])
    names, steps = (taken.column(key).to_pylist() for key in ("snapshot", "step"))
    return Origin(other, snapshot, dict(zip(names, steps, strict=True)).get(snapshot))


def start_state(
    spec: RunSpec, run: RunDirectory, state: TrainState, origin: Origin | None
) -> Mapping[str, Tensor]:
    """Bring ``state`` to where the run begins, and put on record what that is.

    Args:
        spec: The run.
        run: Its directory.
        state: The state with the starting weights of the seed.
        origin: What the run begins with.

    Returns:
        The parameters that distances are measured from, by the distance's name.

    Raises:
        RunDirectoryError: If the snapshot is not the one that the run began with, is
            damaged, or does not fit.
    """
    drawn = state.vector()
    if origin is None or spec.start is None:
        return {"distance_from_start": drawn}
    keeps = spec.start.optimizer == "keep"
    _record_origin(run, origin, keeps=keeps)
    try:
        state.model.load_state_dict(load_weights(origin.run, origin.snapshot))
        if keeps:
            # Buffers and counts of the other run, rate and momentum of this one.
            own = state.optimizer.state_dict()
            state.optimizer.load_state_dict({**own, **load_optimizer(origin.optimizer)})
    except (RuntimeError, ValueError) as error:
        raise RunDirectoryError(
            f"run {run.manifest.run_id} needs a snapshot that fits its network and "
            f"optimizer, got {origin.snapshot!r} of {origin.run.manifest.run_id} "
            f"({error}); start from another arm."
        ) from error
    forked = state.vector()
    from_origin = spec.start.distance_from == "origin"
    return {
        "distance_from_start": drawn if from_origin else forked,
        "distance_from_fork": forked,
    }


def _record_origin(run: RunDirectory, origin: Origin, *, keeps: bool) -> None:
    """Write into the manifest what the run begins with, or check that it is the same.

    Raises:
        RunDirectoryError: If the run began with something else.
    """
    facts = {
        "run_id": origin.run.manifest.run_id,
        "snapshot": origin.snapshot,
        "step": str(origin.step),
        "sha256": stated_checksum(origin.weights),
    }
    if keeps:
        facts["optimizer_sha256"] = stated_checksum(origin.optimizer)
    known = run.manifest.origin
    if known and dict(known) != facts:
        raise RunDirectoryError(
            f"run {run.manifest.run_id} needs the start that it began with, "
            f"{known.get('snapshot')!r} of {known.get('run_id')} (SHA-256 "
            f"{known.get('sha256', '')[:12]}…), which has changed since "
            f"({facts['sha256'][:12]}…); restore that run, or delete {run.path} and "
            "resume to run this one again."
        )
    run.write_manifest(replace(run.manifest, origin=facts))
