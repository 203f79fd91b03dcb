"""Statistics of claims: each maps the runs of one seed to one number.

Each is a frozen dataclass whose fields are its settings, in one table by name. A new
one is one class with ``of_group``, and one line of ``STATISTICS``.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any

from noisekit.core.errors import UsageError
from noisekit.core.references import is_reference
from noisekit.stats.statistics.along_runs import CurveGap, TailMean, TimeTo
from noisekit.stats.statistics.comparisons import (
    Difference,
    Interaction,
    Ratio,
    Value,
)
from noisekit.stats.statistics.grids import (
    BestDifference,
    RangeWidth,
    Spread,
    SpreadRatio,
)
from noisekit.stats.statistics.own import Own
from noisekit.stats.statistics.statistic import GroupNumbers, Statistic
from noisekit.stats.statistics.tables import (
    RunTables,
    Tables,
    arms_named,
    curves,
    values_at,
)
from noisekit.stats.statistics.trends import Fit, Rank, Slope

_ALL: tuple[type[Statistic], ...] = (
    Difference,
    Ratio,
    Value,
    TailMean,
    Slope,
    RangeWidth,
    BestDifference,
    Interaction,
    CurveGap,
    TimeTo,
    Spread,
    SpreadRatio,
    Fit,
    Rank,
)

STATISTICS: Mapping[str, type[Statistic]] = MappingProxyType(
    {kind.name: kind for kind in _ALL}
)
"""Statistics by the name that a recipe gives them."""


def statistic_of(table: Mapping[str, Any]) -> Statistic:
    """Return the statistic that a recipe's table describes.

    Args:
        table: ``name``, one of ``STATISTICS`` or ``module:function``, and settings.

    Raises:
        UsageError: If there is none of that name, or a setting is unknown, missing, of
            the wrong type or out of bounds.

    Example:
        >>> statistic_of({"name": "value", "quantity": "test_error"}).words()
        ''
    """
    settings = {key: value for key, value in table.items() if key != "name"}
    name = table.get("name")
    if isinstance(name, str) and is_reference(name):
        common: dict[str, Any] = {
            key: settings.pop(key)
            for key in ("quantity", "treatment", "reference")
            if key in settings
        }
        return _checked(Own, {"function": name, "arguments": settings, **common})
    if not isinstance(name, str) or name not in STATISTICS:
        raise UsageError(
            f"name needs to be one of {', '.join(STATISTICS)} or module:function, got "
            f"{json.dumps(name, default=str)}."
        )
    return _checked(STATISTICS[name], settings)


def table_of(statistic: Statistic) -> dict[str, Any]:
    """Return the table that ``statistic_of`` makes an equal statistic of."""
    if isinstance(statistic, Own):
        common = {"quantity": statistic.quantity, "treatment": statistic.treatment}
        given = {key: value for key, value in common.items() if value}
        below = statistic.reference
        pair = {} if below is None else {"reference": below}
        return {"name": statistic.function, **given, **pair, **statistic.arguments}
    stated = {
        item.name: getattr(statistic, item.name)
        for item in fields(statistic)
        if getattr(statistic, item.name) != item.default
    }
    return {"name": statistic.name, **stated}


def _checked(kind: type[Statistic], settings: Mapping[str, Any]) -> Statistic:
    known = {item.name: item for item in fields(kind)}
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise UsageError(
            f"{unknown[0]} is no setting of {kind.name!r}, which has "
            f"{', '.join(known)}."
        )
    missing = [
        key
        for key, item in known.items()
        if key not in settings
        and item.default is MISSING
        and item.default_factory is MISSING
    ]
    if missing:
        raise UsageError(f"{missing[0]} is missing, which {kind.name!r} needs.")
    return kind(**settings)


__all__ = [
    "STATISTICS",
    "BestDifference",
    "CurveGap",
    "Difference",
    "Fit",
    "GroupNumbers",
    "Interaction",
    "Own",
    "RangeWidth",
    "Rank",
    "Ratio",
    "RunTables",
    "Slope",
    "Spread",
    "SpreadRatio",
    "Statistic",
    "Tables",
    "TailMean",
    "TimeTo",
    "Value",
    "arms_named",
    "curves",
    "statistic_of",
    "table_of",
    "values_at",
]
