"""What rescalings did to a measure: ratios, exponents and a verdict."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from noisekit.core.results import Estimate, Interval

if TYPE_CHECKING:
    import pandas as pd

_MISFIT = 0.05
"""Largest error of a power law, in units of the logarithm, that is called a fit."""


class Invariance(StrEnum):
    """Whether a measure stays under a rescaling."""

    INVARIANT = "invariant"
    NOT_INVARIANT = "not invariant"
    NOT_RESOLVED = "not resolved"
    """The measure's own error is too large to tell."""


@dataclass(frozen=True, slots=True)
class RescalingEffect:
    r"""What one family of rescalings does to a measure.

    Attributes:
        name: The family.
        factors: Its factors :math:`\alpha`.
        ratios: ``m(T w) / m(w)`` at each.
        intervals: Where the ratios lie by the measure's own errors, together at 95 %;
            of no width for an exact measure.
        function_changes: Largest difference of outputs at each, relative to the
            largest output.
        loss_changes: Relative change of the training loss at each: the negative
            control, a measure that must stay.
        exponent: Slope ``p`` of ``log ratio = p log factor``, by least squares.
        misfit: Largest error of that law, in units of ``log ratio``.
        last_exponent: Slope between the two largest factors, where a sum of powers is
            nearest to its largest one.
        verdict: Whether the measure is invariant.
    """

    name: str
    factors: tuple[float, ...]
    ratios: tuple[float, ...]
    intervals: tuple[Interval, ...]
    function_changes: tuple[float, ...]
    loss_changes: tuple[float, ...]
    exponent: float
    misfit: float
    last_exponent: float
    verdict: Invariance

    @property
    def is_power_law(self) -> bool:
        """Whether the ratios follow one power of the factor within 5 %."""
        return self.misfit <= _MISFIT

    def __str__(self) -> str:
        """Write the ratios, the verdict and the exponent with how well it fits."""
        ratios = ", ".join(f"{ratio:.3g}" for ratio in self.ratios)
        law = f"factor^{self.exponent:.2f}"
        if not self.is_power_law:
            law = (
                f"no single power (best {law}, off by up to {self.misfit:.2g} in the "
                f"logarithm; {self.last_exponent:.2f} at the end)"
            )
        return f"{self.name:12s} {ratios}: {self.verdict}; {law}"


@dataclass(frozen=True, slots=True)
class InvarianceReport:
    """What rescalings that keep the function do to a measure.

    Attributes:
        measure: Its name.
        value: The measure at the weights as they are.
        repeatable: Whether it gave the same bits twice. Errors are then common to
            both sides of a ratio, and a ratio of 1 is no accident.
        tolerance: Ratios up to ``1 + tolerance``, and down to its inverse, count as
            unchanged.
        effects: One for each family of rescalings.
    """

    measure: str
    value: Estimate
    repeatable: bool
    tolerance: float
    effects: tuple[RescalingEffect, ...] = field(repr=False)

    @property
    def verdict(self) -> Invariance:
        """Invariant only under all families; not invariant under one is enough."""
        result = {effect.verdict for effect in self.effects}
        for worst in (Invariance.NOT_INVARIANT, Invariance.NOT_RESOLVED):
            if worst in result:
                return worst
        return Invariance.INVARIANT

    def __getitem__(self, name: str) -> RescalingEffect:
        """Return the effect of one family.

        Raises:
            KeyError: If there is no such family.
        """
        for effect in self.effects:
            if effect.name == name:
                return effect
        known = ", ".join(effect.name for effect in self.effects)
        raise KeyError(f"no rescaling {name!r}; there are: {known}")

    def frame(self) -> "pd.DataFrame":
        """Return a table with a row for each family and factor."""
        import pandas as pd

        rows = [
            {
                "measure": self.measure,
                "rescaling": effect.name,
                "factor": factor,
                "ratio": effect.ratios[i],
                "low": effect.intervals[i].low,
                "high": effect.intervals[i].high,
                "function_change": effect.function_changes[i],
                "loss_change": effect.loss_changes[i],
                "verdict": str(effect.verdict),
            }
            for effect in self.effects
            for i, factor in enumerate(effect.factors)
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        """Write the verdict and one line for each family."""
        factors = ", ".join(f"{f:g}" for f in self.effects[0].factors)
        lines = [f"  {effect}" for effect in self.effects]
        head = f"{self.measure}: {self.verdict} (ratios at factors {factors})"
        return "\n".join([head, *lines])
