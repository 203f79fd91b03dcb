"""What displaces the weights, each in its unit, and the loss of normalised logits."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk, LossFn
from noisekit.core.settings import NonNegative
from noisekit.core.vocabulary import Invariance
from noisekit.sharpness.measurement import Measure

Logits = Literal["raw", "unit_norm", "unit_std"]

NEEDS_CLASSES = "outputs (n, classes) and class targets"


@dataclass(frozen=True, kw_only=True)
class Perturbation(Measure):
    """Settings of measures that displace the weights, each in a unit of its own.

    Attributes:
        adaptive: Whether a weight is displaced in proportion to its size.
        eta: Added to the unit of every weight.
        logits: ``"raw"``, or centred and of ``"unit_norm"`` or ``"unit_std"``.
    """

    adaptive: bool = False
    eta: NonNegative = 0.0
    logits: Logits = "raw"

    def __post_init__(self) -> None:
        """Check the settings, and that ``eta`` has a use."""
        super().__post_init__()
        if self.eta > 0 and not self.adaptive:
            raise UsageError(
                f"eta goes with adaptive=True, got eta={self.eta:g} and "
                f"adaptive={self.adaptive}; ASAM uses 0.01."
            )

    @property
    def needs(self) -> str:
        """Classes, to normalise logits."""
        return "" if self.logits == "raw" else NEEDS_CLASSES

    @property
    def invariance(self) -> Invariance:
        """That of the quantity, where units are the weights' own and nothing else."""
        return self.quantity.invariance_in(self.variant) or "raw"

    @property
    def variant(self) -> str:
        """The settings that tell it apart; ``eta`` where it is not 0."""
        return self.stating_eta(super().variant)

    def stating_eta(self, variant: str) -> str:
        """Return a variant with ``eta``, which breaks the invariance, beside it."""
        return f"{variant},eta={self.eta:g}" if self.eta else variant


def with_logits(risk: EmpiricalRisk, logits: Logits) -> EmpiricalRisk:
    """Return the risk whose loss is of normalised logits.

    Logits are centred over the classes and divided by their Euclidean norm
    (``"unit_norm"``), or by their standard deviation (``"unit_std"``), which leaves
    them larger by the root of the number of classes.

    Source:
        Andriushchenko et al. 2023, arXiv:2302.07011.
    """
    if logits == "raw":
        return risk
    return risk.with_loss(_on_normalised(risk.loss_fn, logits == "unit_std"))


def normalised_logits(logits: Tensor, *, unit_std: bool) -> Tensor:
    """Return logits ``(n, classes, ...)``, centred and of unit norm or deviation.

    Where all logits of an example are equal they become zero.

    Raises:
        UsageError: If there is no axis of at least two classes.
    """
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise UsageError(
            "normalised logits need outputs (n, classes, ...) of at least 2 classes, "
            f"got shape {tuple(logits.shape)}; use logits='raw'."
        )
    centred = logits - logits.mean(1, keepdim=True)
    squares = centred.square()
    total = squares.mean(1, keepdim=True) if unit_std else squares.sum(1, keepdim=True)
    return centred * torch.where(total > 0, total, 1.0).rsqrt()


def _on_normalised(loss_fn: LossFn, unit_std: bool) -> LossFn:
    # Outputs and targets are whatever the model returns and the loader gives.
    def loss(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise UsageError(
                "normalised logits need a model that returns one tensor, got "
                f"{type(outputs).__name__}; use logits='raw'."
            )
        return loss_fn(normalised_logits(outputs, unit_std=unit_std), targets)

    return loss
