"""The interface of an estimator of gradient noise, and what one returns for a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from noisekit.core.results import Unavailable
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class StepNoise:
    """The noise of one step, as one estimator reads it.

    Attributes:
        name: The estimator's name.
        label: The same with the size of its units, where those are several examples.
        methods: By parameter, how it was read.
        moments: Sufficient statistics, in total.
        layer_moments: The same with one entry per parameter, where they exist.
        note: What a reader must know.
        example_sq_norms: ``|g_i|²``, where all examples were read.
        unread: By index of a parameter that is not covered: why.
        of_step_gradient: Whether the noise is that of the step's own gradient.
        averaged: Whether ranks average their statistics, since their units have no
            gradient in common.
    """

    name: str
    label: str
    methods: Mapping[str, str]
    moments: GradientMoments
    layer_moments: GradientMoments | None = None
    note: str | None = None
    example_sq_norms: Tensor | None = None
    unread: Mapping[int, str] = field(default_factory=dict)
    of_step_gradient: bool = True
    averaged: bool = False


class NoiseEstimator:
    """One way to estimate gradient noise; subclass it for one of your own.

    An instance belongs to one probe. The probe calls ``set_up`` once, ``install`` for
    every recorder, ``request`` before each step that is read, and ``noise`` after it.

    Attributes:
        name: Its name in readings and tables.
        settings: Options of the probe that its constructor takes, by keyword.
        reads_calls: Whether it reads the layers' calls, and so single examples.
        reads_coupled: Whether it can read a model that couples the examples.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    reads_calls: ClassVar[bool] = False
    reads_coupled: ClassVar[bool] = False

    def set_up(self, context: ProbeContext) -> None:
        """Check that the loop has what the estimator needs.

        Raises:
            UsageError: If it has not, with the way out.
        """

    def install(self, recorder: Recorder) -> None:
        """Give a recorder what it needs beside its own hooks."""

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request what the next step's passes have to capture.

        Args:
            recorder: Its ``wanted`` and ``units.request`` are added to.
            num_readings: Readings so far.
        """

    def on_loss(self, recorder: Recorder, targets: Any) -> None:  # the loss's own
        """Look at the open pass when the loss has been computed, before backward."""

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        """Return the noise of a step, or why there is none; nothing is waited for."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:  # plain values that JSON can hold
        """Return what a resumed run needs so that readings go on as they would."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # read from a file
        """Go on where the estimator that gave ``state`` was."""
