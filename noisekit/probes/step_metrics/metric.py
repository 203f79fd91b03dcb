"""The interface of a quantity of one step: what it captures, sums and returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import CapturedCall, ForwardPass, StepRecord
from noisekit.probes.capture.step_weights import Number
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.reading import Reading

Quantity = StepQuantity | HessianForms
State = Mapping[str, Number]
"""Tensors, and numbers that the host knows, by name."""


@dataclass(frozen=True, slots=True)
class RankSum:
    """How a named tensor of every rank becomes one of all ranks.

    With ``W_k`` the weight of rank ``k``'s mean in the mean over all examples:
    ``sum_k W_k^p x_k / (sum_k W_k)^p``, and the plain average over the ranks for p = 0.

    Attributes:
        size: Number of elements.
        power: ``p``: 1 for means over examples, 2 for sums of squares in the mean's
            units, 0 for what is alike in all ranks but for noise.
    """

    size: int
    power: int = 0


@dataclass(frozen=True, slots=True)
class MetricStep:
    """What a metric computes its value from.

    Attributes:
        reading: Gradient and noise of the step, over all ranks.
        state: What ``measure`` has returned, over all ranks.
        applied_factor: The gradient that is applied, in units of the mean gradient.
    """

    reading: Reading
    state: State
    applied_factor: Number

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the state."""
        value = self.state[name]
        assert isinstance(value, Tensor)
        return value


class StepCapture:
    """What is looked at in a step that is read; does nothing by default.

    Called on the training device, in the middle of training: nothing may wait for a
    value, draw from a global generator or write to what training owns.

    Attributes:
        wanted: Whether the step that has begun is read.
    """

    wanted: bool = False

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request what the next step's passes have to capture."""

    def on_calls(self, index: int, calls: Sequence[CapturedCall]) -> None:
        """Look at a parameter's calls; its gradient is complete in ``.grad``."""

    def on_gradient(self, record: StepRecord) -> None:
        """Look at ``.grad`` after a backward pass, before anybody clips it."""

    def on_loss(self, active: ForwardPass, targets: Any, loss: Tensor) -> None:
        """Look at the loss of the open pass, before its backward pass."""

    def before_step(self) -> None:
        """Look at the parameters before the optimizer changes them."""


class StepMetric(StepCapture):
    """A quantity of one step; subclass it for one of your own.

    ``measure`` is called right after the optimizer's step, and ``value`` when the
    reading is made, which over several ranks is when somebody looks at it: it must
    depend on its argument alone.

    Attributes:
        name: Its name in ``Reading.quantities``.
        quantities: Names of the values that it returns, if there are several.
        settings: Options of the probe that its constructor takes, by keyword.
        single_process: Why it cannot be read over several ranks; empty where it can.
    """

    name: ClassVar[str]
    quantities: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    single_process: ClassVar[str] = ""

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the names of its values."""
        return cls.quantities or (cls.name,)

    def set_up(self, context: ProbeContext) -> None:
        """Prepare for a loop, and check that it has what is needed.

        Raises:
            UsageError: If it has not, with the way out.
        """

    @property
    def rank_sums(self) -> Mapping[str, RankSum]:
        """How the tensors of ``measure`` are summed over ranks.

        Those that are not named have to be the same on every rank, as are the
        parameters and the reduced gradient.
        """
        return {}

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return this rank's state by name; tensors stay on their device.

        Args:
            step: What the step has left.
            noise: This rank's noise, as the reading's own estimator reads it.
        """
        return {}

    def value(
        self, step: MetricStep
    ) -> Quantity | Mapping[str, Quantity] | Unavailable:
        """Return the value, or one by name for several."""
        raise NotImplementedError

    def resume(self) -> None:
        """Note that training began before the probe was attached."""

    def state_dict(self) -> dict[str, Any]:  # plain values that JSON can hold
        """Return what a resumed run needs so that values go on as they would."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # read from a file
        """Go on where the metric that gave ``state`` was."""


def call_fault(step: StepInputs, *, fewest: int = 2) -> Unavailable | None:
    """Why the layers' calls tell nothing of this step, if so."""
    faults = [step.fault()] if step.fault() else []
    faults += [f for p in step.passes for f in (*p.faults, *p.unread.values())]
    if not faults and not all(p.read for p in step.passes):
        faults = ["no layer's call was captured in this step"]
    count = step.record.num_examples
    if not faults and count < fewest:
        faults = [f"a variance needs 2 examples per step, got {count}"]
    return Unavailable(faults[0]) if faults else None
