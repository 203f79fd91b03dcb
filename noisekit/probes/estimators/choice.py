"""The ways to estimate gradient noise, what each needs, and which one is asked for."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from noisekit.core.errors import UsageError
from noisekit.probes.capture.unit_norms import UnitRequest

EstimatorName = Literal[
    "per_example",
    "rows",
    "chunks",
    "accumulation",
    "ranks",
    "random_signs",
    "norm_layers",
    "ghost",
    "preconditioned",
]
Estimator = Literal["auto"] | EstimatorName
Unit = Literal["example", "sequence", "token"]

ESTIMATORS: tuple[str, ...] = ("auto", *get_args(EstimatorName))

OF_CALLS = frozenset({"per_example", "rows", "chunks", "norm_layers", "preconditioned"})
"""Those that need every layer's input and output gradient."""

COUPLED = "couples the examples"
"""What every reason says where examples have no gradients of their own."""


@dataclass(frozen=True, slots=True)
class EstimatorOptions:
    """Which estimators are read on each step, and how finely.

    Attributes:
        names: Their names; the first is the reading's own.
        row_share: Share of the batch whose examples ``"rows"`` reads.
        num_chunks: Parts of the batch that ``"chunks"`` reads.
        num_signs: Extra backward passes of ``"random_signs"``.
        calibrate_every: Readings from one full reading to the next by which
            ``"norm_layers"`` is calibrated; ``None`` for a reading of those layers
            alone.
        ghost_batch: Examples of a ghost batch.
        generator: Draws rows and signs; never PyTorch's global one.
    """

    names: tuple[Estimator, ...] = ("auto",)
    row_share: float = 0.25
    num_chunks: int = 4
    num_signs: int = 1
    calibrate_every: int | None = None
    ghost_batch: int | None = None
    generator: torch.Generator = field(
        default_factory=lambda: torch.Generator().manual_seed(0)
    )

    @classmethod
    def of(
        cls,
        estimator: Estimator | tuple[Estimator, ...],
        *,
        row_share: float = 0.25,
        num_chunks: int = 4,
        num_signs: int = 1,
        calibrate_every: int | None = None,
        ghost_batch: int | None = None,
        generator: torch.Generator | None = None,
    ) -> "EstimatorOptions":
        """Return the options of ``attach``, checked.

        Raises:
            UsageError: If a name is unknown or a number out of range.
        """
        names = (estimator,) if isinstance(estimator, str) else tuple(estimator)
        drawing = generator or torch.Generator().manual_seed(0)
        options = cls(
            names,
            row_share,
            num_chunks,
            num_signs,
            calibrate_every,
            ghost_batch,
            drawing,
        )
        _check(options)
        return options

    @property
    def own(self) -> Estimator:
        """The reading's own estimator."""
        return self.names[0]

    @property
    def of_calls(self) -> frozenset[str]:
        """The estimators among them that read layer calls, "auto" as per-example."""
        names = {"per_example" if name == "auto" else name for name in self.names}
        return OF_CALLS & names

    def request(self, names: Collection[str]) -> UnitRequest:
        """Return what of the layers' calls the estimators ``names`` need."""
        return UnitRequest(
            per_example="per_example" in names,
            row_share=self.row_share if "rows" in names else 0.0,
            num_chunks=self.num_chunks if "chunks" in names else 0,
            norm_layers="norm_layers" in names,
            preconditioned="preconditioned" in names,
        )

    def calibrates(self, num_readings: int) -> bool:
        """Whether the next reading is a full one, for calibration."""
        every = self.calibrate_every
        return (
            "norm_layers" in self.names
            and every is not None
            and num_readings % every == 0
        )


def refuse_unit(unit: str) -> None:
    """Refuse what noise scales cannot be counted in.

    Raises:
        UsageError: With what they can.
    """
    if unit not in get_args(Unit):
        listed = "'example', 'sequence' or 'token'"
        raise UsageError(f"unit needs to be {listed}, got {unit!r}.")


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in ESTIMATORS:
            listed = ", ".join(repr(known) for known in ESTIMATORS)
            raise UsageError(f"estimator needs to be one of {listed}, got {name!r}.")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"estimator needs one or more different names, got {names}.")
    if names[0] == "preconditioned":
        raise UsageError(
            "'preconditioned' noise needs an estimator in front of it, got it first; "
            "write estimator=('auto', 'preconditioned')."
        )


def _check(options: EstimatorOptions) -> None:
    _check_names(options.names)
    if not 0.0 < options.row_share <= 1.0:
        raise UsageError(
            f"row_share needs a share of the batch in (0, 1], got {options.row_share}."
        )
    for name, value, least in (
        ("num_chunks", options.num_chunks, 2),
        ("num_signs", options.num_signs, 1),
        ("calibrate_every", options.calibrate_every, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} needs to be {least} or more, got {value}.")
