"""What the risk is at one point, and what a loss function has to return for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.distributed import Ranks, sum_over_ranks
from noisekit.core.errors import LossShapeError


@dataclass(frozen=True, slots=True)
class RiskValue:
    """The risk at one point.

    Attributes:
        loss: ``F`` [loss].
        error: Share of examples that are misclassified, where outputs are
            ``(n, classes)`` and targets are classes ``(n,)``; else ``None``.
    """

    loss: float
    error: float | None


def zero(device: torch.device) -> Tensor:
    """Return the start of a sum, in double precision wherever the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros((), dtype=dtype, device=device)


class RiskSums:
    """Sums over batches of the loss, and of the misclassified where outputs tell."""

    def __init__(self, device: torch.device, *, classified: bool) -> None:
        self._loss, self._wrong, self._counted = (zero(device) for _ in range(3))
        self._classified = classified

    def add(
        self, loss: Tensor, outputs: object, targets: object, *, weight: float
    ) -> None:
        """Add one batch's loss, times its weight."""
        self._loss += weight * loss.to(self._loss.dtype)
        self._classified = self._classified and is_classified(outputs, targets)
        if self._classified:
            assert isinstance(outputs, Tensor)
            assert isinstance(targets, Tensor)
            valid = targets >= 0  # negative classes mean "ignore"
            self._counted += valid.sum()
            self._wrong += (valid & (outputs.argmax(1) != targets)).sum()

    def over(self, ranks: Ranks) -> RiskValue:
        """Return the risk over all processes."""
        sums = torch.stack([self._loss, self._wrong, self._counted])
        loss, wrong, counted = sum_over_ranks(sums, ranks)
        share = float(wrong / counted) if self._classified else None
        return RiskValue(float(loss), share)


def scalar_loss(loss: object) -> Tensor:
    """Return what a loss function returned, checked to be one number.

    Raises:
        LossShapeError: If it is not one floating-point number.
    """
    if isinstance(loss, Tensor) and not loss.ndim and loss.is_floating_point():
        return loss
    if isinstance(loss, Tensor):
        what = f"a tensor of shape {tuple(loss.shape)} and type {loss.dtype}"
    else:
        what = f"a {type(loss).__name__}"
    raise LossShapeError(
        f"loss_fn needs to return one floating-point number, got {what}; reduce it "
        "with .mean() or .sum()."
    )


def is_classified(outputs: object, targets: object) -> bool:
    """Whether ``outputs`` are scores ``(n, classes)`` and ``targets`` classes."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.ndim == 2
        and targets.ndim == 1
        and outputs.shape[0] == targets.shape[0]
        and outputs.shape[1] > 1
        and not targets.is_floating_point()
        and not targets.is_complex()
    )
