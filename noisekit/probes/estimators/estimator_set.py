"""The table of estimators, and the ones of a probe in the order of its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from noisekit.core.errors import UsageError
from noisekit.core.results import Unavailable
from noisekit.probes.capture.example_weights import example_weights
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.tokens import TokenCount, input_tokens, target_tokens
from noisekit.probes.capture.unit_norms import UnitRequest
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.automatic import Automatic
from noisekit.probes.estimators.estimator import NoiseEstimator, StepNoise
from noisekit.probes.estimators.examples import PerExample, Rows
from noisekit.probes.estimators.ghost import Ghost
from noisekit.probes.estimators.groups import Accumulation, Chunks, Ranks
from noisekit.probes.estimators.norm_layers import NormLayers
from noisekit.probes.estimators.preconditioned import Preconditioned
from noisekit.probes.estimators.random_signs import RandomSigns
from noisekit.probes.estimators.step_inputs import StepInputs

ESTIMATORS: Mapping[str, type[NoiseEstimator]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Automatic,
            PerExample,
            Rows,
            Chunks,
            Accumulation,
            Ranks,
            RandomSigns,
            NormLayers,
            Ghost,
            Preconditioned,
        )
    }
)
"""All estimators by name, ``"auto"`` first."""


@dataclass(frozen=True, slots=True)
class EstimatedNoise:
    """The noise of one step as each estimator reads it.

    Attributes:
        found: By estimator, the reading's own first, if there is one.
        asked: The names that were asked for, the reading's own first.
        missing: By estimator that was asked for: why it has no noise.
    """

    found: Mapping[str, StepNoise]
    asked: tuple[str, ...]
    missing: Mapping[str, Unavailable]

    @property
    def noise(self) -> StepNoise | Unavailable:
        """The reading's own."""
        missing = self.missing.get(self.asked[0])
        return next(iter(self.found.values())) if missing is None else missing


class EstimatorSet:
    """The estimators of one probe, in the order that was asked for.

    Attributes:
        names: Their names; the first is the reading's own.
    """

    def __init__(
        self, estimators: Sequence[NoiseEstimator], context: ProbeContext
    ) -> None:
        """Set the estimators up.

        Raises:
            UsageError: If they do not fit together or into the loop.
        """
        self._estimators = estimators
        self._context = context
        self.names = tuple(estimator.name for estimator in estimators)
        _check_names(self.names)
        for estimator in estimators:
            estimator.set_up(context)
            estimator.install(context.recorder)
        if not any(estimator.reads_coupled for estimator in estimators):
            context.recorder.wanted.refuses_coupling = self.names[0]

    @property
    def reads_calls(self) -> bool:
        """Whether any of them reads layers' calls, "auto" not counted."""
        return any(estimator.reads_calls for estimator in self._estimators)

    # --------------------------------------------------------------- while training

    def request(self, recorder: Recorder, *, wanted: bool, num_readings: int) -> None:
        """Request what the next step's passes are to capture.

        Args:
            recorder: The probe's own, or one for a single measurement.
            wanted: Whether the step is read at all.
            num_readings: Readings so far.
        """
        wants = recorder.wanted
        wants.gradient, wants.examples = wanted, False
        wants.inputs = wanted and self._counts_inputs
        recorder.units.request = UnitRequest()
        recorder.own_gradients.want(False)
        if recorder.signed is not None:
            recorder.signed.num_signs = 0
        for estimator in self._estimators if wanted else ():
            estimator.request(recorder, num_readings)

    @property
    def _counts_inputs(self) -> bool:
        """Whether tokens are counted in the model's inputs."""
        return self._context.unit == "token" and self._context.loss_fn is None

    def install(self, recorder: Recorder) -> None:
        """Have a recorder for a single measurement read what the probe's own does."""
        for estimator in self._estimators:
            estimator.install(recorder)
        self.request(recorder, wanted=True, num_readings=0)

    def on_loss(self, recorder: Recorder, targets: Any) -> None:  # the loss's own
        """Look at the targets of the pass that the loss has been computed of."""
        active, context = recorder.active, self._context
        if active is None or not recorder.wanted.gradient or not active.num_examples:
            return
        active.weights = example_weights(
            context.example_weights, context.loss_fn, targets, active.num_examples
        )
        active.weights_from = getattr(context.loss_fn, "reduction", "mean")
        if context.example_weights is not None:
            active.weights_from = "given"
        if context.unit == "token":
            active.tokens = target_tokens(
                context.tokens, context.loss_fn, targets, active.num_examples
            )
        for estimator in self._estimators:
            estimator.on_loss(recorder, targets)

    # --------------------------------------------------------------------- readings

    def noise(self, step: StepInputs) -> EstimatedNoise:
        """Return what every estimator reads of a step, or why some read nothing."""
        found: dict[str, StepNoise] = {}
        missing: dict[str, Unavailable] = {}
        fault = step.fault()
        for estimator in self._estimators:
            noise = Unavailable(fault) if fault else estimator.noise(step)
            if isinstance(noise, StepNoise):
                found.setdefault(noise.name, noise)
            else:
                missing[estimator.name] = noise
        left = {name: why for name, why in missing.items() if name not in found}
        return EstimatedNoise(found, self.names, left)

    def tokens(self, step: StepInputs) -> TokenCount | Unavailable | None:
        """Return how many tokens count; ``None`` where those are not asked for."""
        if self._context.unit != "token":
            return None
        counts = [p.tokens for p in step.passes]
        if self._counts_inputs:
            axis = self._context.recorder.batch_dim
            counts = [input_tokens(p.inputs, p.num_examples, axis) for p in step.passes]
        counted = TokenCount.of(counts, step.weights, step.gradient)
        return Unavailable(counted) if isinstance(counted, str) else counted

    def check_asked(self, name: str | None) -> None:
        """Check that readings may have an estimator of that name.

        Raises:
            UsageError: With those that they have.
        """
        names = [e.name for e in self._estimators if not isinstance(e, Automatic)]
        for estimator in self._estimators:
            if isinstance(estimator, Automatic):
                names += [w.name for w in estimator.ways if w.name not in names]
        if name is not None and name not in names:
            raise UsageError(
                f"estimator needs to be one of those that were read, "
                f"{', '.join(names)}, got {name!r}; name it in attach()."
            )

    # --------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:  # plain values that JSON can hold
        """Return the random state, and the estimators' own states by name."""
        states = {e.name: e.state_dict() for e in self._estimators}
        return {"generator": self._context.generator.get_state().tolist(), **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # read from a file
        """Go on with the same draws, where the estimators that gave ``state`` were."""
        drawn = torch.tensor(state["generator"], dtype=torch.uint8)
        self._context.generator.set_state(drawn)
        for estimator in self._estimators:
            if estimator.name in state:
                estimator.load_state_dict(state[estimator.name])


def _check_names(names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise UsageError(f"estimator needs one or more different names, got {names}.")
    if names[0] == Preconditioned.name:
        raise UsageError(
            "'preconditioned' noise needs an estimator in front of it, got it first; "
            "write estimator=('auto', 'preconditioned')."
        )
