"""What policies need, taken from a probe's readings."""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from noisekit.core.results import Estimate
from noisekit.noise.step_quantity import StepQuantity


class StepReading(Protocol):
    """A probe's reading of one step."""

    @property
    def step(self) -> int:
        """Which step."""

    @property
    def grad_sq_norm(self) -> Estimate:
        """``|g|²``."""

    @property
    def variance_trace(self) -> Estimate:
        """``tr Σ``."""

    @property
    def debiased_grad_sq_norm(self) -> Estimate:
        """``|G|²``."""

    @property
    def quantities(self) -> Mapping[str, object]:
        """Step metrics by name."""


class ReadingSource(Protocol):
    """A probe, as far as policies look at it."""

    @property
    def step(self) -> int:
        """Steps taken."""

    @property
    def last_reading(self) -> StepReading | None:
        """The latest reading."""


_OF_READING = ("grad_sq_norm", "variance_trace", "debiased_grad_sq_norm")
_METRICS = ("inner_product_test", "orthogonality_test")


def quantities_for(names: Iterable[str]) -> tuple[str, ...]:
    """Return the ``quantities=`` of a probe that has readings of the named values.

    Example:
        >>> quantities_for(["loss", "inner_product_test"])
        ('inner_product_test',)
    """
    metrics = {name: name for name in _METRICS}
    metrics["conv_compat_variance"] = "cabs_conv_compat"
    return tuple(metrics[name] for name in names if name in metrics)


def values_of_reading(
    source: ReadingSource,
    names: Iterable[str],
    *,
    loss: float | None = None,
    learning_rate: float | None = None,
) -> dict[str, float]:
    """Return the named values of the probe's last step; NaN where it has none.

    Waits for the device. Names that no reading has, such as the loss, are left out.

    Args:
        source: The probe.
        names: Fields of :class:`Observation`.
        loss: Mean loss of the step's batch, for ``conv_compat_variance``.
        learning_rate: Rate of the step, for the same.
    """
    reading = source.last_reading
    if reading is not None and reading.step != source.step:
        reading = None  # of an earlier step: this one was not read
    found = {}
    for name in names:
        if name in _OF_READING:
            found[name] = math.nan if reading is None else getattr(reading, name).value
        elif name in _METRICS:
            found[name] = _metric(reading, name)
        elif name == "conv_compat_variance":
            # The metric is rate times variance over loss.
            asked = _metric(reading, "cabs_conv_compat")
            found[name] = math.nan
            if loss is not None and learning_rate:
                found[name] = asked * loss / learning_rate
    return found


def _metric(reading: StepReading | None, name: str) -> float:
    if reading is None:
        return math.nan
    value = reading.quantities.get(name)
    return value.value if isinstance(value, StepQuantity) else math.nan
