"""Everything else that a probe makes of the same backward pass, as far as asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.probes.capture.hooks import is_suspended
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import CapturedCall, StepRecord
from noisekit.probes.estimators.assembly import scale_of
from noisekit.probes.history import Pending
from noisekit.probes.options import ProbeOptions
from noisekit.probes.ranks.examples_seen import SummedReading
from noisekit.probes.ranks.rank_payload import StepParts
from noisekit.probes.reading import Reading
from noisekit.probes.step_metrics.derived import (
    Found,
    LaterQuantities,
    call_fault,
    of_products,
    of_signal,
    position_sums,
    with_derived,
    with_quantities,
)
from noisekit.probes.step_metrics.gradient_norms import GradientNorms, spread_of_step
from noisekit.probes.step_metrics.hessian_forms import HessianReplay
from noisekit.probes.step_metrics.layer_statistics import ByProducts
from noisekit.probes.step_metrics.movement import Movement
from noisekit.probes.step_metrics.options import (
    DERIVED,
    OF_CALLS,
    OF_LOSS,
    OF_MOVEMENT,
    OF_SQUARES,
)
from noisekit.probes.step_metrics.step_loss import (
    applied_factor,
    learning_rates,
    mean_loss,
    weights_of,
)


class StepQuantities:
    """Sets up a recorder for the quantities of a probe, and adds them to readings.

    Attributes:
        norms: How gradient norms are distributed, where that was asked for.
    """

    def __init__(
        self,
        recorder: Recorder,
        optimizer: torch.optim.Optimizer,
        options: ProbeOptions,
    ) -> None:
        self.norms: GradientNorms | None = None
        self._names = options.quantities
        self._recorder = recorder
        self._optimizer = optimizer
        self._options = options
        self._wanted = False
        self._by_products = ByProducts(
            self._names,
            recorder.parameters,
            recorder.plan,
            units=recorder.units,
            loss_reduction=options.loss_reduction,
            microbatch_weights=options.microbatch_weights,
        )
        self._movement = Movement(self._names, recorder.parameters)
        self._hessian: HessianReplay | None = None
        if "hessian_noise_scale" in self._names:
            self._hessian = HessianReplay(recorder, options)
        if "grad_histogram" in self._names:
            self.norms = GradientNorms.empty(recorder.parameters[0].device)
        self._handles: list[RemovableHandle] = []
        if self._names:
            recorder.listener = self
            hook = optimizer.register_step_pre_hook(self._before_step)
            self._handles.append(hook)

    def remove(self) -> None:
        """Take the hook off the optimiser."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --------------------------------------------------------------- while training

    def want(self, *, wanted: bool, num_readings: int) -> None:
        """Decide what the next step's passes are to record beside the noise.

        Args:
            wanted: Whether the step is read at all.
            num_readings: Readings so far.
        """
        self._wanted, names = wanted, set(self._names)
        recorder = self._recorder
        self._by_products.wanted = wanted and bool(names & OF_CALLS)
        request = recorder.units.request
        request.squares = wanted and bool(names & OF_SQUARES)
        if wanted and names & OF_CALLS:
            recorder.wanted.examples = True
        if wanted and "orthogonality_test" in names:
            request.per_example = True
        if self._hessian is not None:
            due = num_readings % self._options.hessian_every == 0
            self._hessian.wanted = wanted and due
            recorder.wanted.inputs |= self._hessian.wanted

    def read(self, index: int, calls: Sequence[CapturedCall]) -> None:
        """Read a parameter whose gradient is complete."""
        self._by_products.read(index, calls)

    def gradient_ready(self, record: StepRecord) -> None:
        """Look at what a backward pass has left."""
        self._by_products.gradient_ready(record)
        self._movement.gradient_ready()

    def observe(self, targets: Any, loss: Tensor) -> None:  # whatever the loss takes
        """Look at the loss of the open pass, before its backward pass."""
        active = self._recorder.active
        if not self._wanted or is_suspended(self._recorder) or active is None:
            return
        if not torch.is_grad_enabled():
            return
        active.gathered.loss = loss.detach()
        active.gathered.num_losses += 1
        if self._hessian is not None and self._hessian.wanted:
            self._hessian.observe(active, targets)
            if not self._hessian.has_ghosts:
                active.inputs = None

    def _before_step(self, *_: object) -> None:
        if self._wanted:
            self._movement.before_step()

    # --------------------------------------------------------------------- readings

    def added(self, reading: Reading, record: StepRecord) -> Reading:
        """Return this rank's reading with all that needs no sum over ranks."""
        if not self._names:
            return reading
        found: dict[str, StepQuantity | HessianForms] = {}
        missing: dict[str, str] = {}
        moved = self._movement.after_step()
        if self.norms is not None:
            self.norms = self.norms.with_step(reading)
        for name in self._names:
            if name in OF_MOVEMENT:
                said: StepQuantity | str | Found = moved[name]
            elif name in DERIVED:
                continue
            else:
                said = self._said(name, reading, record)
            if isinstance(said, str):
                missing[name] = said
            else:
                found |= {name: said} if isinstance(said, StepQuantity) else said
        for forward_pass in record.passes:
            forward_pass.gathered.square_sums.clear()  # as large as the parameters
        return with_quantities(reading, found, missing)

    def parts(
        self, reading: Reading, record: StepRecord, loss_scale: Tensor | None
    ) -> StepParts | None:
        """Return what quantities take of this rank's examples, if there are such."""
        if not self.num_parts:
            return None
        factor = scale_of(record, loss_scale, self._options.loss_reduction)
        rates = learning_rates(
            self._optimizer, self._recorder.parameters, reading.layer_sq_norms
        )
        if self._recorder.replicas.ranks.alone:
            # Of a step along the mean gradient, whatever the loss does over the batch.
            rates = rates * applied_factor(record, self._options)
        positions: Tensor | str = "the convolutions were not read"
        if "cabs_conv_compat" in self._names:
            positions = position_sums(record, reading.layer_sq_norms)
        return StepParts(
            mean_loss(record, self._options),
            positions if isinstance(positions, str) else positions * factor,
            self._by_products.convolutions,
            rates,
            self._curvature(record),
            self._options.num_chunks,
        )

    @property
    def num_parts(self) -> int:
        """Entries that those take in the vector that is summed over ranks."""
        if not (OF_LOSS | {"hessian_noise_scale"}) & set(self._names):
            return 0
        count = len(self._recorder.parameters)
        return StepParts.size(count, self._options.num_chunks)

    def completed(
        self, reading: Reading | SummedReading, parts: StepParts | None
    ) -> Reading | Pending:
        """Return the reading with what follows from the noise over all ranks."""
        names = [name for name in self._names if name in DERIVED]
        if not names:
            return reading
        if isinstance(reading, Reading):
            return with_derived(reading, names, parts)
        return LaterQuantities(reading, names)

    def _said(
        self,
        name: str,
        reading: Reading,
        record: StepRecord,
    ) -> StepQuantity | str | Found:
        """What one quantity is, or why it is not known."""
        if name == "grad_histogram":
            return spread_of_step(reading)
        fault = call_fault(record)
        if fault:
            return fault
        weights = weights_of(record, self._options)
        if name in OF_SQUARES:
            return of_signal(name, record, weights.example_sq_sum)
        return of_products(name, record, weights.example_sq_sum)

    def _curvature(self, record: StepRecord) -> HessianForms | str:
        forms = next((p.gathered.hessian for p in record.passes), None)
        if isinstance(forms, HessianForms):
            return forms
        if self._hessian is None or not self._hessian.wanted:
            return f"it is read once in {self._options.hessian_every} readings"
        return forms or "the loss was not seen: call it through probe.loss_fn"

    # --------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:  # plain values that JSON can hold
        """Return the histograms; copies of parameters are not part of it."""
        return {} if self.norms is None else self.norms.state_dict()

    def load_state_dict(
        self,
        state: Mapping[str, Any],  # read from a file
        *,
        started: bool,
    ) -> None:
        """Go on with the same histograms.

        Args:
            state: What ``state_dict`` gave.
            started: Whether training has begun.
        """
        if started:
            self._movement.resume()
        if self.norms is not None and state:
            device = self._recorder.parameters[0].device
            self.norms = GradientNorms.from_state(state, device)
