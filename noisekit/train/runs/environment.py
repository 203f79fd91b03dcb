"""What of a process decides bits: threads, kernels, randomness, versions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from noisekit.core.errors import DeviceMismatchError, RunDirectoryError
from noisekit.records import RunDirectory, RunStatus
from noisekit.records.provenance import host_facts, software_versions
from noisekit.train.data.datasets import DataSplits
from noisekit.train.recipes.sections import ComputeSpec

_DECIDE_BITS = ("python", "torch", "numpy", "noisekit")
_SAME_HOST = ("machine", "processor")


@contextmanager
def computing(compute: ComputeSpec) -> Iterator[int]:
    """Compute as the recipe says; on exit the process is as it was.

    Yields:
        The number of threads that PyTorch uses.

    Raises:
        DeviceMismatchError: If the device is not on this machine.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    strict = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic
    filled: bool = fill.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        torch.empty(0, device=compute.device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceMismatchError(
            f"compute.device needs a device of this machine, got {compute.device!r} "
            f"({str(error).splitlines()[0]}); use --device cpu."
        ) from error
    try:
        torch.set_num_threads(compute.threads)
        torch.use_deterministic_algorithms(compute.deterministic)
        # Filling fresh memory costs time and hides no randomness of ours.
        fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield torch.get_num_threads()
    finally:
        fill.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(strict)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def begin(run: RunDirectory, data: DataSplits) -> None:
    """Mark ``run`` as running, here, and put on record what differs since it began.

    Raises:
        RunDirectoryError: If the data are not those that the run began with.
    """
    manifest = run.manifest
    if manifest.status is RunStatus.CREATED:
        manifest = replace(manifest, versions=software_versions(), host=host_facts())
    known = manifest.data.get("sha256", data.sha256)
    if known != data.sha256:
        raise RunDirectoryError(
            f"run {manifest.run_id} needs the data that it began with (SHA-256 "
            f"{known[:12]}…), got others ({data.sha256[:12]}… from {data.origin}); "
            "bring those back, or run the recipe into a new directory."
        )
    facts = {"name": data.name, "origin": data.origin, "sha256": data.sha256}
    faults = dict.fromkeys((*manifest.faults, *_changes(run)))
    run.write_manifest(
        replace(
            manifest,
            status=RunStatus.RUNNING,
            reason="",
            data=facts,
            faults=tuple(faults),
        )
    )


def _changes(run: RunDirectory) -> Iterator[str]:
    if run.manifest.status is RunStatus.CREATED:
        return
    pairs = (
        (_DECIDE_BITS, run.manifest.versions, software_versions()),
        (_SAME_HOST, run.manifest.host, host_facts()),
    )
    for names, before, after in pairs:
        for name in names:
            if before.get(name) != after[name]:
                yield (
                    f"begun with {name} {before.get(name)}, resumed with "
                    f"{after[name]}: its bits are not those of an unbroken run"
                )
