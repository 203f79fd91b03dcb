"""A statistic of the user's own, by ``module:function``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from noisekit.core.errors import UsageError
from noisekit.core.references import is_reference, resolve
from noisekit.stats.statistics.statistic import GroupNumbers, Statistic
from noisekit.stats.statistics.tables import Tables


@dataclass(frozen=True, kw_only=True)
class Own(Statistic):
    """What a function of the user's own makes of each group of runs.

    The function is called as ``function(tables, group, **arguments)`` and returns one
    number per seed, as a mapping. It is imported when a claim is judged, and only
    inside ``noisekit.train.allow_code``.

    Attributes:
        function: ``module:function``.
        arguments: What else it is called with.
    """

    quantity: str = ""
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "module:function"

    def fault(self) -> str:
        """Return what is wrong with the settings, or nothing."""
        if not is_reference(self.function):
            return f"needs a function as module:function, got {self.function!r}."
        return super().fault()

    @property
    def quantities(self) -> tuple[str, ...]:
        """The quantity, where it is named."""
        return (self.quantity,) if self.quantity else ()

    def of_group(self, tables: Tables, group: str) -> GroupNumbers:
        """Return what the function does.

        Raises:
            UsageError: If it may not be imported here, or returns something else.
        """
        function = resolve(self.function)
        if not callable(function):
            raise UsageError(
                f"statistic {self.function!r} needs a function of tables and group, "
                f"got {type(function).__name__}."
            )
        found = function(tables, group, **self.arguments)
        try:
            return GroupNumbers(
                {
                    int(seed): math.nan if value is None else float(value)
                    for seed, value in dict(found).items()
                }
            )
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"statistic {self.function!r} needs to return one number per seed, "
                f"such as {{0: 1.5, 1: 1.7}}, got {type(found).__name__}: {error}."
            ) from error

    def words(self) -> str:
        """Return the function's name."""
        return self.function
