"""The first estimator that works for the loop at hand."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisekit.core.layers.per_example import coupling
from noisekit.core.results import Unavailable
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.examples import PerExample
from noisekit.probes.estimators.groups import Accumulation, Ranks
from noisekit.probes.estimators.step_inputs import StepInputs

_WAY_OUT = (
    "use estimator='ghost' with loss_fn= and ghost_batch=, or accumulate gradients "
    "over several micro-batches"
)


class Automatic(NoiseEstimator):
    """Per-example norms, else the ranks' gradients, else the micro-batches'.

    A way that covers all parameters comes before one that does not. What the fallbacks
    need is captured from the reading on that follows one which needed them, and from
    the first where the model is known to couple its examples.
    """

    name = "auto"
    reads_coupled = True

    def __init__(self) -> None:
        self._per_example = PerExample()
        self._fallbacks = (Ranks(), Accumulation())
        self._falls_back = False

    @property
    def ways(self) -> tuple[NoiseEstimator, ...]:
        """The estimators that are tried, in this order."""
        return (self._per_example, *self._fallbacks)

    def install(self, recorder: Recorder) -> None:
        """Look whether the model may couple its examples."""
        modules = list(recorder.model.modules())
        couples = any(isinstance(m, _BatchNorm) or coupling(m) for m in modules)
        if not recorder.replicas.ranks.alone and any(
            isinstance(module, nn.SyncBatchNorm) for module in modules
        ):
            couples = False  # ranks are coupled too, and tell nothing
        self._may_couple = couples

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request per-example norms, and micro-batches' where they are needed."""
        self._per_example.request(recorder, num_readings)
        if self._may_couple or recorder.opaque or self._falls_back:
            for fallback in self._fallbacks:
                fallback.request(recorder, num_readings)

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the noise in the first way that works."""
        first = self._per_example.noise(step)
        self._falls_back = isinstance(first, Unavailable) or bool(first.unread)
        if not self._falls_back:
            return first
        for fallback in self._fallbacks:
            noise = fallback.noise(step)
            if isinstance(noise, StepNoise):
                return noise
        # Of all reasons the first counts: that examples have no norms.
        coupled = any(p.coupling for p in step.passes)
        if isinstance(first, Unavailable) and coupled:
            return Unavailable(first.reason, _WAY_OUT)
        return first

    def state_dict(self) -> dict[str, Any]:
        """Return whether the next reading captures what the fallbacks need."""
        return {"falls_back": self._falls_back}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the probe that gave ``state`` would."""
        self._falls_back = bool(state["falls_back"])
