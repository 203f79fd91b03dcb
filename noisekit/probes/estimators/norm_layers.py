"""Noise of the normalisation layers, as a proxy for the whole model's.

Source:
    Gray et al. 2024, "Normalization layer per-example gradients are sufficient to
    predict gradient noise scale in transformers", arXiv:2411.00999.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.results import Unavailable
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.unit_norms import is_norm_layer
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs


class NormLayers(NoiseEstimator):
    """Per-example norms of the normalisation layers alone, calibrated where wanted.

    The scale factor from their ``tr Σ`` to the whole model's is a ratio of sums over
    the full readings so far; the sums stay on their device.
    """

    name = "norm_layers"
    reads_calls = True
    settings = ("calibrate_every",)

    def __init__(self, *, calibrate_every: int | None) -> None:
        """Take a full reading once in ``calibrate_every``, or never."""
        self._every = calibrate_every
        self._num_full = 0
        self._whole: Tensor | float = 0.0
        self._part: Tensor | float = 0.0

    def set_up(self, context: ProbeContext) -> None:
        """Refuse calibration over several ranks.

        Raises:
            UsageError: If it is asked for there.
        """
        ranks = context.recorder.replicas.ranks
        if self._every is not None and not ranks.alone:
            raise UsageError(
                f"calibrate_every needs one process, got {ranks.size} ranks: the ratio "
                "is not a sum over ranks; leave it out, or use estimator='rows'."
            )

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the norm layers, or all layers where the next reading is full."""
        recorder.wanted.examples = True
        recorder.units.request.norm_layers = True
        if self._every is not None and num_readings % self._every == 0:
            recorder.units.request.per_example = True

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the normalisation layers' moments, scaled to the whole model's."""
        fault = step.call_fault(lambda p: p.read)
        if fault:
            return fault
        unread = step.unread
        chosen = [
            is_norm_layer(way) and index not in unread
            for index, way in enumerate(step.methods.values())
        ]
        if not all(p.sq_norms for p in step.passes) or not any(chosen):
            return Unavailable(
                "the model has no normalisation layer whose parameters are read"
            )
        others = {i: "" for i, own in enumerate(chosen) if not own}
        tables = [
            step.table({i: n for i, n in p.sq_norms.items() if chosen[i]})
            for p in step.passes
        ]
        share = step.weights.example_sq_sum
        moments, _ = step.units(tables, share, without=others)
        if self._every is not None:
            self._calibrate(step, moments)
        note = "of the normalisation layers alone: an uncalibrated proxy"
        if self._num_full:
            ratio = self._whole / self._part
            moments = _calibrated(moments, ratio, step.gradient.sum())
            note = f"a proxy, calibrated by {self._num_full} full readings"
        methods = {
            name: way if own else "not read: normalisation layers stand for it"
            for (name, way), own in zip(step.methods.items(), chosen, strict=True)
        }
        return StepNoise(
            self.name,
            self.name,
            methods,
            moments,
            note=note,
            of_step_gradient=False,
        )

    def _calibrate(self, step: StepInputs, part: GradientMoments) -> None:
        """Count a step in whose every layer was read."""
        if step.unread or any(len(p.sq_norms) < len(p.read) for p in step.passes):
            return
        tables = [step.table(p.sq_norms) for p in step.passes]
        whole, _ = step.units(tables, step.weights.example_sq_sum)
        self._whole = self._whole + unit_trace(whole)
        self._part = self._part + unit_trace(part)
        self._num_full += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as numbers."""
        return {
            "num_readings": self._num_full,
            "whole": float(self._whole),
            "part": float(self._part),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same calibration."""
        self._num_full = int(state["num_readings"])
        self._whole = torch.tensor(float(state["whole"]))
        self._part = torch.tensor(float(state["part"]))


def unit_trace(moments: GradientMoments) -> Tensor:
    """Return ``tr Σ`` of single units, whatever their size."""
    n = moments.num_effective
    return (moments.mean_sq_norm - moments.grad_sq_norm) / (1 - 1 / n)


def _calibrated(
    part: GradientMoments, ratio: Tensor | float, grad_sq_norm: Tensor
) -> GradientMoments:
    """Moments with the whole gradient's norm and the part's noise times the ratio."""
    n = part.num_effective
    mean_sq = ratio * unit_trace(part) * (1 - 1 / n) + grad_sq_norm
    spread = part.mean_fourth - part.mean_sq_norm.square()
    mean_fourth = mean_sq.square() + ratio * ratio * spread
    return replace(
        part,
        sum_sq_norm=mean_sq / n,
        sum_fourth=mean_fourth / n**3,
        grad_sq_norm=grad_sq_norm,
    )
