"""What a run of the model without the batch's last example tells about its calls."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from noisekit.probes.capture.calls import shrunk_axis, tensors_of, versions_of
from noisekit.probes.capture.step_record import CallKey, CapturedCall

_ROUNDING = 0.5
"""Power of the precision up to which equal examples may differ between batch sizes."""


class SmallerBatch:
    """Inputs of the sites' calls on one example less, beside those of the whole batch.

    The axis that shrinks is that of the examples. Where the other examples' values are
    not what they were, the examples are coupled, or their rows are in another order.
    Outputs of which two axes shrink are of pairs of examples, which couples them too.

    Attributes:
        shapes: Shapes of the inputs by call.
    """

    def __init__(self, calls: Iterable[CapturedCall]) -> None:
        self.shapes: dict[CallKey, list[torch.Size]] = {}
        self._calls = {captured.key: captured for captured in calls}
        self._excess: dict[CallKey | None, Tensor] = {}
        self._pairs = False

    def note(self, path: str, tensors: list[Tensor]) -> None:
        """Take in the next call of the site at ``path``."""
        key = (path, sum(1 for other, _ in self.shapes if other == path))
        self.shapes[key] = [tensor.shape for tensor in tensors]
        captured = self._calls.get(key)
        if captured is None or captured.versions != versions_of(captured.call):
            return
        whole = tensors_of((captured.call.args, captured.call.kwargs))
        self._compare(key, whole, tensors)

    def note_outputs(self, whole: Any, smaller: Any) -> None:  # whatever models return
        """Take in what the model returned for the batch, and for one example less."""
        outputs, fewer = tensors_of(whole), tensors_of(smaller)
        self._pairs = any(map(_has_pairs, outputs, fewer))
        self._compare(None, outputs, fewer)

    def _compare(
        self, key: CallKey | None, whole: list[Tensor], smaller: list[Tensor]
    ) -> None:
        excesses = [
            excess
            for a, b in zip(whole, smaller, strict=False)
            for excess in (_excess(a.detach(), b),)
            if excess is not None
        ]
        if excesses:
            self._excess[key] = torch.stack(excesses).amax()

    def forget_values(self) -> None:
        """Keep the shapes only."""
        self._excess = {}

    def disordered(self) -> set[CallKey | None]:
        """Return calls whose examples differ; ``None`` stands for the outputs."""
        if self._pairs:
            return {None}
        found = {key: e for key, e in self._excess.items() if not e.is_meta}
        if not found:
            return set()
        excesses = torch.stack(list(found.values())).tolist()
        # Not ``<= 0``: a NaN is left to the training, which will see it anyway.
        return {key for key, value in zip(found, excesses, strict=True) if value > 0}


def _has_pairs(whole: Tensor, smaller: Tensor) -> bool:
    """Whether entries that training may use are of two examples each."""
    if not whole.requires_grad or whole.dim() != smaller.dim():
        return False
    pairs = zip(whole.shape, smaller.shape, strict=True)
    return sum(size == less + 1 for size, less in pairs) > 1


def _excess(whole: Tensor, smaller: Tensor) -> Tensor | None:
    """By how much the examples differ, beyond what rounding may explain."""
    if not whole.is_floating_point() or smaller.dtype != whole.dtype:
        return None
    axis = shrunk_axis(smaller.shape, whole.shape)
    if axis is None or smaller.numel() == 0:
        return None
    kept = whole.narrow(axis, 0, smaller.shape[axis])
    largest = kept.abs().amax()
    tolerance = torch.finfo(whole.dtype).eps ** _ROUNDING
    excess: Tensor = (kept - smaller).abs().amax() - tolerance * largest
    return excess.double()
