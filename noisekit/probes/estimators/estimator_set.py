"""The estimators of one probe: what they want of a step, and what they make of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisekit.core.errors import UsageError
from noisekit.core.layers.per_example import coupling
from noisekit.probes.capture.example_weights import example_weights
from noisekit.probes.capture.hooks import is_suspended
from noisekit.probes.capture.preconditioner import Preconditioner
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.signed_backward import SignedBackward
from noisekit.probes.capture.step_record import StepRecord
from noisekit.probes.capture.step_weights import Number, StepWeights
from noisekit.probes.capture.tokens import input_tokens, target_tokens
from noisekit.probes.estimators.assembly import FALLBACKS, StepPosition, assemble
from noisekit.probes.estimators.calibration import Calibration
from noisekit.probes.estimators.choice import EstimatorOptions, refuse_unit
from noisekit.probes.estimators.ghost import GhostReplay
from noisekit.probes.options import ProbeOptions
from noisekit.probes.reading import Reading

_OF_PARTS = frozenset({"auto", "accumulation", "ranks", "ghost"})
"""Those that have something to say where examples are coupled."""


class NoiseReaders:
    """Sets up a recorder for the estimators of a probe, and assembles their readings.

    Attributes:
        options: Which estimators, and how finely they read.
        ghosts: Replays ghost batches, if those are asked for.
    """

    def __init__(
        self,
        recorder: Recorder,
        optimizer: torch.optim.Optimizer,
        options: ProbeOptions,
    ) -> None:
        self.options = EstimatorOptions.of(
            options.estimator,
            row_share=options.row_share,
            num_chunks=options.num_chunks,
            num_signs=options.num_signs,
            calibrate_every=options.calibrate_every,
            ghost_batch=options.ghost_batch,
            generator=options.generator,
        )
        refuse_unit(options.unit)
        self._recorder = recorder
        self._optimizer = optimizer
        self._probe_options = options
        self._calibration = Calibration()
        modules = list(recorder.model.modules())
        self._may_couple = any(
            isinstance(module, _BatchNorm) or coupling(module) for module in modules
        )
        if not recorder.replicas.ranks.alone and any(
            isinstance(module, nn.SyncBatchNorm) for module in modules
        ):
            self._may_couple = False  # ranks are coupled too, and tell nothing
        self.ghosts = self._ghost_replay(recorder)
        self._counts_inputs = options.unit == "token" and options.loss_fn is None
        self._set_up(recorder)
        if not _OF_PARTS & set(self.options.names):
            recorder.wanted.refuses_coupling = self.options.own

    def _ghost_replay(self, recorder: Recorder) -> GhostReplay | None:
        options = self._probe_options
        loss_fn, ghost_batch = options.loss_fn, options.ghost_batch
        if "ghost" not in self.options.names or loss_fn is None or not ghost_batch:
            return None
        return GhostReplay(recorder, loss_fn, ghost_batch, options.loss_reduction)

    def _set_up(self, recorder: Recorder) -> None:
        """Give a recorder what the estimators need beside its own hooks."""
        names = self.options.names
        recorder.units.generator = self.options.generator
        if "preconditioned" in names:
            recorder.units.preconditioner = Preconditioner(
                self._optimizer, recorder.parameters
            )
        if "random_signs" in names:
            recorder.signed = SignedBackward(
                recorder.caller,
                recorder.parameters,
                recorder,
                generator=self.options.generator,
                batch_dim=recorder.batch_dim,
                rank=recorder.replicas.ranks.rank,
            )

    def want(self, recorder: Recorder, *, wanted: bool, num_readings: int) -> None:
        """Decide what the next step's passes are to record.

        Args:
            recorder: The probe's own, or one for a single measurement.
            wanted: Whether the step is read at all.
            num_readings: Readings so far.
        """
        names, wants = set(self.options.names), recorder.wanted
        of_calls = set(self.options.of_calls)
        if self.options.calibrates(num_readings):
            of_calls.add("per_example")
        wants.gradient = wanted
        wants.examples = wanted and bool(of_calls or "random_signs" in names)
        wants.inputs = wanted and (self.ghosts is not None or self._counts_inputs)
        recorder.units.request = self.options.request(of_calls)
        own = bool({"accumulation", "ranks"} & names) or (
            "auto" in names and (self._may_couple or bool(recorder.opaque))
        )
        recorder.own_gradients.want(wanted and own)
        if recorder.signed is not None:
            recorder.signed.num_signs = self.options.num_signs if wanted else 0

    def set_up_twin(self, twin: Recorder) -> None:
        """Have a recorder for a single measurement read what the probe's own does."""
        self._set_up(twin)
        self.want(twin, wanted=True, num_readings=0)

    def observe(self, targets: Any) -> None:  # whatever the loss takes
        """Look at the targets of the pass that the loss is being computed of."""
        recorder = self._recorder
        if is_suspended(recorder) or not torch.is_grad_enabled():
            return
        self.weigh(recorder, targets)
        if self.ghosts is not None:
            self.ghosts.observe(targets)

    def weigh(self, recorder: Recorder, targets: Any) -> None:  # as above
        """Note what each example of the open pass counts in the loss."""
        active, options = recorder.active, self._probe_options
        if active is None or not recorder.wanted.gradient or not active.num_examples:
            return
        active.weights = example_weights(
            options.example_weights, options.loss_fn, targets, active.num_examples
        )
        if options.unit == "token":
            active.tokens = target_tokens(
                options.tokens, options.loss_fn, targets, active.num_examples
            )

    def check_asked(self, estimator: str | None) -> None:
        """Refuse an estimator that the readings cannot have.

        Raises:
            UsageError: With those that they have.
        """
        names: list[str] = [name for name in self.options.names if name != "auto"]
        if "auto" in self.options.names:
            names += [name for name in FALLBACKS if name not in names]
        if estimator is not None and estimator not in names:
            raise UsageError(
                f"estimator needs to be one of those that were read, "
                f"{', '.join(names)}, got {estimator!r}; name it in attach()."
            )

    def reading(
        self,
        record: StepRecord,
        position: StepPosition,
        loss_scale: Tensor | None,
        *,
        num_ranks: int = 1,
    ) -> Reading:
        """Return the reading of a step's record, to be summed over so many ranks."""
        options = self._probe_options
        for forward_pass in record.passes if self._counts_inputs else ():
            forward_pass.tokens = input_tokens(
                forward_pass.inputs, forward_pass.num_examples, options.batch_dim
            )
        return assemble(
            record,
            position,
            self._recorder.plan.coverage(),
            loss_reduction=options.loss_reduction,
            microbatch_weights=options.microbatch_weights,
            loss_scale=loss_scale,
            estimators=self.options,
            calibration=self._calibration,
            unit=options.unit,
            num_ranks=num_ranks,
        )

    def count(self, record: StepRecord) -> Number:
        """What the step's examples count together, in a loss that is a sum."""
        options = self._probe_options
        weights = StepWeights.of(
            record.passes, options.loss_reduction, options.microbatch_weights
        )
        return sum(weights.counts)

    def state_dict(self) -> dict[str, Any]:  # plain values that JSON can hold
        """Return the random state and the calibration."""
        state = self.options.generator.get_state()
        return {
            "generator": state.tolist(),
            "calibration": self._calibration.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # read from a file
        """Go on with the same draws and the same calibration."""
        drawn = torch.tensor(state["generator"], dtype=torch.uint8)
        self.options.generator.set_state(drawn)
        self._calibration.load_state_dict(state["calibration"])
