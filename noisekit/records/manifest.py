"""The manifest of a run: what it is, what it was made with, how far it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Self

from noisekit.core.errors import RunDirectoryError
from noisekit.records.files import read_json
from noisekit.records.integrity import check_object
from noisekit.records.provenance import host_facts, now, software_versions
from noisekit.records.schema import FORMAT
from noisekit.records.stored_table import RESTORE


class RunStatus(StrEnum):
    """How far a run is."""

    CREATED = "created"
    RUNNING = "running"
    DONE = "done"
    DIVERGED = "diverged"
    """The loss left the finite numbers, which is a result, recorded and complete."""
    SKIPPED = "skipped"
    """The run that it starts from never came that far, which is a result as well."""
    FAILED = "failed"
    """An error stopped it; it can be resumed."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self in {RunStatus.DONE, RunStatus.DIVERGED, RunStatus.SKIPPED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a run is, what it was made with, and how far it is.

    Attributes:
        run_id: Name, unique in its set.
        arm: Arm of the experiment.
        seed: Seed of all its random streams.
        factors: What the arms differ in.
        recipe: Everything that decides its bits, resolved.
        data: Name, origin and digest of its data.
        network: What its network was built as: ``num_params``, and ``batch_norms``, the
            number of layers that normalize over the batch; empty in older runs.
        origin: Run, snapshot, update and digests that it began with, where that was
            another run's snapshot.
        status: How far it is.
        reason: Why it ended as it did.
        versions: Versions of the software that began it.
        host: The machine that began it.
        created: When it was created, ISO 8601.
        updated: When this manifest was written, ISO 8601.
        costs: What it took, such as ``train_seconds``.
        faults: What a reader should know before trusting its bits.
        digests: Of each sealed file, by its path in the directory; ``None`` before
            anything is sealed, and in runs of format 1.
        segments: By table, the last segment that was begun, where that is known: one
            of at least that number, or a sealed file, has to be there.
        format: Version of the directory.
    """

    run_id: str
    arm: str
    seed: int
    factors: Mapping[str, object] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    network: Mapping[str, int] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    status: RunStatus = RunStatus.CREATED
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=software_versions)
    host: Mapping[str, str] = field(default_factory=host_facts)
    created: str = field(default_factory=now)
    updated: str = field(default_factory=now)
    costs: Mapping[str, float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    digests: Mapping[str, str] | None = None
    segments: Mapping[str, int] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the manifest in ``path``.

        Raises:
            RunDirectoryError: If it is missing, damaged or altered.
            NewerFormatError: If a newer noisekit wrote it.
        """
        content = read_json(path, remedy=RESTORE)
        check_object(path, content, remedy=RESTORE)
        try:
            return cls._from(content)
        except (KeyError, TypeError, ValueError) as error:
            raise RunDirectoryError(
                f"{path} needs to hold a run's manifest, got a damaged one "
                f"({type(error).__name__}: {error}); {RESTORE}."
            ) from error

    @classmethod
    def _from(cls, content: dict[str, object]) -> Self:
        missing = {"run_id", "arm", "seed", "status", "format"} - content.keys()
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        for name, kind in _KINDS.items():
            if name in content and not isinstance(content[name], kind):
                raise TypeError(f"{name} is {content[name]!r}")
        known = {item.name for item in fields(cls)}
        values = {key: value for key, value in content.items() if key in known}
        values["status"] = RunStatus(str(content["status"]))
        faults = content.get("faults")
        values["faults"] = tuple(faults) if isinstance(faults, list) else ()
        # The kinds were checked above, one by one.
        return cls(**values)  # type: ignore[arg-type]


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "run_id": str,
    "arm": str,
    "seed": int,
    "factors": dict,
    "segments": dict,
    "recipe": dict,
    "data": dict,
    "network": dict,
    "origin": dict,
    "versions": dict,
    "host": dict,
    "costs": dict,
    "faults": list,
    "digests": (dict, NoneType),
    "format": int,
}
