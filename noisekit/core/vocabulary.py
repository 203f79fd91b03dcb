"""Every quantity once: its name, symbol, unit, meaning and source.

Tables take their columns from here, figures their labels, the report its glossary.
"""

from collections.abc import Mapping
from types import MappingProxyType

from noisekit.core.errors import UsageError
from noisekit.core.noise_quantities import NOISE_QUANTITIES
from noisekit.core.quantity import Quantity
from noisekit.core.sharpness_quantities import SHARPNESS_QUANTITIES
from noisekit.core.step_quantities import STEP_QUANTITIES
from noisekit.core.training_quantities import TRAINING_QUANTITIES

__all__ = ["QUANTITIES", "Quantity", "quantity"]

QUANTITIES: Mapping[str, Quantity] = MappingProxyType(
    {
        q.name: q
        for q in (
            *TRAINING_QUANTITIES,
            *NOISE_QUANTITIES,
            *STEP_QUANTITIES,
            *SHARPNESS_QUANTITIES,
        )
    }
)


def quantity(name: str) -> Quantity:
    """Return the quantity called ``name``.

    Raises:
        UsageError: If the vocabulary has no such name.
    """
    try:
        return QUANTITIES[name]
    except KeyError:
        known = ", ".join(sorted(QUANTITIES))
        raise UsageError(f"no quantity is called {name!r}; known: {known}.") from None
